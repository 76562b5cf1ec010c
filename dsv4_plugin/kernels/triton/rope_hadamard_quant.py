"""Indexer queries: RoPE, 128-point Hadamard rotation and FP8 in one launch.

The rotation is a product with a 64-point matrix of ±1, made in registers, and one butterfly: bf16
products with ±1 are exact, so only the order of the fp32 sums differs from butterflies all through,
and the matrix units do it. Byte floor a token of n heads: 256·n for the queries read, 128·n
written, 8·n for the weights, 256 for cos and sin.

Variants: none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..strides import require_contiguous
from .entries import hadamard_sign, load_rotation, rotate
from .formats import INTERPRETED, fp8_scale, round_to_bf16, to_bf16, to_fp8_bytes

_BLOCK_ROWS = 32
_DIM = tl.constexpr(128)
_HADAMARD_SCALE = tl.constexpr(128**-0.5)


@triton.jit
def _hadamard_rows(x, ROWS: tl.constexpr):
    """Unscaled transform of the 128 channels of fp32 `x` [ROWS, 128], rounded to bf16: 64 points a
    half, then 2."""
    i = tl.arange(0, 64)
    sign = hadamard_sign(i[:, None], i[None, :])
    x = tl.reshape(x, (2 * ROWS, 64))
    if INTERPRETED:
        x = tl.dot(round_to_bf16(x), sign, input_precision="ieee")
    else:
        x = tl.dot(to_bf16(x), to_bf16(sign))
    low, high = tl.split(tl.trans(tl.reshape(x, (ROWS, 2, 64)), 0, 2, 1))
    return tl.reshape(tl.trans(tl.join(low + high, low - high), 0, 2, 1), (ROWS, 128))


@triton.jit
def rope_hadamard_quant_kernel(
    q, weights, cos, sin, out, out_weights, rows, heads, factor, BLOCK_ROWS: tl.constexpr
):
    """Grid (ceil(T·heads / BLOCK_ROWS)): a row is one head of one token."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.arange(0, _DIM)
    at = row[:, None] * _DIM + channel[None, :]
    inside = row < rows
    x = tl.load(q + at, mask=inside[:, None], other=0.0).to(tl.float32)
    token = tl.minimum(row, rows - 1) // heads
    cosines, sines = load_rotation(cos, sin, token[:, None], tl.arange(0, _DIM // 2)[None, :], _DIM)
    x = _hadamard_rows(rotate(x, cosines, sines), BLOCK_ROWS) * _HADAMARD_SCALE
    scale, inverse, _ = fp8_scale(tl.max(tl.abs(x), 1))
    tl.store(out + at, to_fp8_bytes(x * inverse[:, None]), mask=inside[:, None])
    weight = tl.load(weights + row, mask=inside, other=0.0)
    tl.store(out_weights + row, weight * factor * scale, mask=inside)


def rope_hadamard_quant(
    q: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, rounding: str
) -> tuple[Tensor, Tensor]:
    """The operator of the same name for bf16 `q` and `rounding` "fp8"."""
    require_contiguous("rope_hadamard_quant", q=q, weights=weights, cos=cos, sin=sin)
    out = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    out_weights = torch.empty_like(weights)
    rows = weights.numel()
    if rows:
        rope_hadamard_quant_kernel[(triton.cdiv(rows, _BLOCK_ROWS),)](
            q,
            weights,
            cos,
            sin,
            out.view(torch.uint8),
            out_weights,
            rows,
            q.shape[1],
            q.shape[2] ** -0.5 * q.shape[1] ** -0.5,
            BLOCK_ROWS=_BLOCK_ROWS,
            num_warps=4,
        )
    return out, out_weights
