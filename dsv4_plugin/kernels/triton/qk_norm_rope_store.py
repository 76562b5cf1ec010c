"""Per-head query norm and RoPE; latent norm, RoPE, FP8 quantisation and paged store: one launch.

Byte floor a token: 2048·h for the queries (bf16 read and written), 1024 for the latent read, 583
for its slot, 256 for cos and sin. Everything is read and written once, so the kernel moves its
floor.

Variants: tokens a page holds, heads of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache.stores import PackedLatentCache
from ..strides import require_contiguous, require_dense_rows
from .entries import load_rotation, norm_and_rotate, rotate, store_latent
from .formats import round_to_bf16, to_bf16

_HEADS_A_PROGRAM = 8
_DIM = tl.constexpr(512)


@triton.jit
def _norm_rope_heads(q, out, cos, sin, token, first_head, heads, eps, BLOCK_HEADS: tl.constexpr):
    head = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    at = (token * heads + head) * _DIM + tl.arange(0, _DIM)[None, :]
    x = tl.load(q + at, mask=head < heads, other=0.0).to(tl.float32)
    x = round_to_bf16(x * tl.rsqrt(tl.sum(x * x, 1) / _DIM + eps)[:, None])
    cosines, sines = load_rotation(cos, sin, token, tl.arange(0, _DIM // 2)[None, :], _DIM)
    tl.store(out + at, to_bf16(rotate(x, cosines, sines)), mask=head < heads)


@triton.jit
def qk_norm_rope_store_kernel(
    q,
    out,
    kv,
    kv_weight,
    cos,
    sin,
    slots,
    pages,
    rope_pages,
    page_bytes,
    kv_stride,
    heads,
    eps,
    SLOTS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Grid (T, 1 + ceil(heads / BLOCK_HEADS)): the first program of a token takes its latent, the
    others heads."""
    token = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        at = tl.arange(0, 8)[:, None] * (_DIM // 8) + tl.arange(0, _DIM // 8)[None, :]
        x = tl.load(kv + token * kv_stride + at).to(tl.float32)
        x = norm_and_rotate(x, kv_weight, eps, cos, sin, token, _DIM)
        store_latent(x, tl.load(slots + token), pages, rope_pages, page_bytes, SLOTS)
    else:
        _norm_rope_heads(
            q, out, cos, sin, token, (tl.program_id(1) - 1) * BLOCK_HEADS, heads, eps, BLOCK_HEADS
        )


def qk_norm_rope_store(
    q: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: PackedLatentCache,
) -> Tensor:
    """The operator of the same name for bf16 `q` and `kv` and a packed cache."""
    tokens, heads, _ = q.shape
    require_contiguous(
        "qk_norm_rope_store", q=q, kv_weight=kv_weight, cos=cos, sin=sin, slots=slots
    )
    require_dense_rows("qk_norm_rope_store", kv=kv)
    out = torch.empty_like(q)
    if tokens:
        block = min(_HEADS_A_PROGRAM, triton.next_power_of_2(heads))
        pages = cache.pages
        qk_norm_rope_store_kernel[(tokens, 1 + triton.cdiv(heads, block))](
            q,
            out,
            kv,
            kv_weight,
            cos,
            sin,
            slots,
            pages,
            pages.view(torch.bfloat16),
            pages.stride(0),
            kv.stride(0),
            heads,
            eps,
            SLOTS=cache.slots_per_page,
            BLOCK_HEADS=block,
            num_warps=4,
        )
    return out
