"""RMSNorm of rows, and the FP8 of what it gives, in one launch.

Byte floor of a row of n channels: 2·n read, 2·n for the normed row and 1.03·n for codes and scales,
those that are asked for; the weight once.

Variants: width as a power of two of its blocks, which outputs are asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .formats import fp8_scale, round_to_bf16, to_bf16, to_fp8_bytes

_BLOCK = tl.constexpr(128)


@triton.jit
def rms_norm_quant_kernel(
    x,
    weight,
    out,
    codes,
    scales,
    x_stride,
    columns,
    eps,
    NORMED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (T): one row of `columns` channels, in BLOCKS blocks of 128."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    channel = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    real = channel < columns
    x = tl.load(x + row * x_stride + channel, mask=real, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / columns + eps)
    x = round_to_bf16(x * factor * tl.load(weight + channel, mask=real, other=0.0).to(tl.float32))
    if NORMED:
        tl.store(out + row * columns + channel, to_bf16(x), mask=real)
    if QUANTIZE:
        scale, inverse, _ = fp8_scale(tl.max(tl.abs(x), 1))
        tl.store(codes + row * columns + channel, to_fp8_bytes(x * inverse[:, None]), mask=real)
        count = columns // _BLOCK
        tl.store(scales + row * count + block, scale, mask=block < count)


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, keep: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The operator of the same name for bf16 `x`."""
    rows, columns = x.shape
    normed, quantizes = keep != "fp8", keep != "normed"
    # the kernel does not touch what is not kept
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device) if normed else x
    codes, scales = out, out
    if quantizes:
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(rows, columns // _BLOCK.value, dtype=torch.float32, device=x.device)
    if rows:
        blocks = triton.next_power_of_2(triton.cdiv(columns, _BLOCK.value))
        rms_norm_quant_kernel[(rows,)](
            x,
            weight,
            out,
            codes.view(torch.uint8),
            scales,
            x.stride(0),
            columns,
            eps,
            NORMED=normed,
            QUANTIZE=quantizes,
            BLOCKS=blocks,
            num_warps=4,
        )
    return out if normed else None, *((codes, scales) if quantizes else (None, None))
