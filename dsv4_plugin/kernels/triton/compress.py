"""Compression of 4 or 128 tokens into one cached entry: pooling, norm, RoPE, quantisation, paged
store, ring update.

A ratio-4 window (8 items, 64 KiB at 512 channels) is one program of one launch. A ratio-128 window
is 512 KiB, more than one compute unit should pull: its channels are pooled in stripes by as many
programs, and the second launch, which the ring update needs anyway, finishes the entry. The ring is
updated by that second launch because a prefill's tokens take the ring rows that windows of the same
step still read, in other programs.

Byte floor of a window: items · 2 · D · 4 for values and scores, its slot (583 or 132), norm and
cos/sin from cache; of a kept token twice its projection. Ratio 128 adds 4 KiB of pooled values,
below 1 %.

Variants: of the pooling the kind of entry (latents of ratio 4 or 128, index keys) and how many a
page holds; the ring's update is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache.layout import LATENT_DIM, entries_per_page
from ...cache.step_plan import Compression
from ...cache.stores import PackedIndexCache, PackedLatentCache
from ..strides import require_contiguous
from .entries import norm_and_rotate, store_index_key, store_latent
from .formats import round_to_bf16

_STRIPE = 32
"""Channels of a ratio-128 window that one program pools."""
_LEAST_BLOCK = 2048
"""Columns of a ring's row that one program copies: those of latents of ratio 4, the widest."""


@triton.jit
def _pool(
    projected,
    ring,
    step_rows,
    ring_rows,
    ape,
    channel,
    width,
    DIM: tl.constexpr,
    RATIO: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """fp32 softmax of the scores over a window's items, per channel, times the values; 0 where all
    scores are -inf."""
    item = tl.arange(0, ITEMS)
    step_row = tl.load(step_rows + item)[:, None]
    ring_row = tl.load(ring_rows + item)[:, None]
    column = (item // RATIO * DIM)[:, None] + channel[None, :]
    in_step, in_ring = step_row >= 0, ring_row >= 0
    from_step = projected + step_row * (2 * width) + column
    from_ring = ring + ring_row * (2 * width) + column
    # At most one of the two holds an item; the other's load is masked and adds 0.
    value = tl.load(from_step, mask=in_step, other=0.0) + tl.load(
        from_ring, mask=in_ring, other=0.0
    )
    score = tl.load(from_step + width, mask=in_step, other=0.0) + tl.load(
        from_ring + width, mask=in_ring, other=0.0
    )
    score += tl.load(ape + (item % RATIO)[:, None] * width + column)
    score = tl.where(in_step | in_ring, score, float("-inf"))
    amax = tl.max(score, 0)
    p = tl.exp(score - tl.where(amax == float("-inf"), 0.0, amax)[None, :])
    total = tl.sum(p, 0)
    return tl.sum(p * value, 0) / tl.where(total == 0, 1.0, total)


@triton.jit
def _finish(
    x,
    window,
    slots,
    norm_weight,
    eps,
    cos,
    sin,
    pages,
    typed_pages,
    page_bytes,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
):
    x = norm_and_rotate(
        tl.reshape(round_to_bf16(x), (8, DIM // 8)), norm_weight, eps, cos, sin, window, DIM
    )
    slot = tl.load(slots + window)
    if DIM == 512:
        store_latent(x, slot, pages, typed_pages, page_bytes, SLOTS)
    else:
        store_index_key(x, slot, pages, typed_pages, page_bytes)


@triton.jit
def pool_kernel(
    projected,
    ring,
    positions,
    step_rows,
    ring_rows,
    ape,
    width,
    pooled,
    slots,
    norm_weight,
    eps,
    cos,
    sin,
    pages,
    typed_pages,
    page_bytes,
    DIM: tl.constexpr,
    RATIO: tl.constexpr,
    ITEMS: tl.constexpr,
    STRIPE: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid (N, DIM / STRIPE): pools a stripe of channels of a window; a stripe that is all of them
    is also stored."""
    window = tl.program_id(0).to(tl.int64)
    if tl.load(positions + window) >= 0:
        channel = tl.program_id(1) * STRIPE + tl.arange(0, STRIPE)
        x = _pool(
            projected,
            ring,
            step_rows + window * ITEMS,
            ring_rows + window * ITEMS,
            ape,
            channel,
            width,
            DIM,
            RATIO,
            ITEMS,
        )
        if STRIPE == DIM:
            _finish(
                x,
                window,
                slots,
                norm_weight,
                eps,
                cos,
                sin,
                pages,
                typed_pages,
                page_bytes,
                DIM,
                SLOTS,
            )
        else:
            tl.store(pooled + window * DIM + channel, x)


@triton.jit(do_not_specialize=("tokens",))
def keep_kernel(
    projected,
    ring,
    ring_write_rows,
    columns,
    tokens,
    positions,
    pooled,
    slots,
    norm_weight,
    eps,
    cos,
    sin,
    pages,
    typed_pages,
    page_bytes,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T + N or T): copies the rows that the ring keeps, and stores the entries of pooled
    windows, if there are any."""
    row = tl.program_id(0).to(tl.int64)
    if row < tokens:
        ring_row = tl.load(ring_write_rows + row)
        if ring_row >= 0:
            column = tl.arange(0, BLOCK)
            x = tl.load(projected + row * columns + column, mask=column < columns)
            tl.store(ring + ring_row * columns + column, x, mask=column < columns)
    else:
        window = row - tokens
        if tl.load(positions + window) >= 0:
            x = tl.load(pooled + window * DIM + tl.arange(0, DIM))
            _finish(
                x,
                window,
                slots,
                norm_weight,
                eps,
                cos,
                sin,
                pages,
                typed_pages,
                page_bytes,
                DIM,
                SLOTS,
            )


def compress(
    projected: Tensor,
    ring: Tensor,
    rows: Compression,
    ape: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: PackedLatentCache | PackedIndexCache,
    dtype: torch.dtype,
    rotate: bool,
) -> None:
    """The operator of the same name for bf16 activations and packed caches; `rotate` goes with
    index keys."""
    require_contiguous(
        "compress",
        projected=projected,
        ring=ring,
        ape=ape,
        norm_weight=norm_weight,
        cos=cos,
        sin=sin,
    )
    tokens, columns = projected.shape
    windows, items = rows.step_row.shape
    if not tokens:
        return
    dim = norm_weight.shape[0]
    stripe = dim if rows.ratio == 4 else _STRIPE
    pages, typed = cache.pages, torch.float32 if rotate else torch.bfloat16
    pooled = projected.new_empty((windows, dim)) if stripe < dim else projected
    numbers = (pooled, rows.slots, norm_weight, eps, cos, sin, pages)
    slots = 1 if rotate else cache.slots_per_page
    if windows:
        pool_kernel[(windows, dim // stripe)](
            projected,
            ring,
            rows.position,
            rows.step_row,
            rows.ring_row,
            ape,
            ape.shape[1],
            *numbers,
            pages.view(typed),
            pages.stride(0),
            DIM=dim,
            RATIO=rows.ratio,
            ITEMS=items,
            STRIPE=stripe,
            SLOTS=slots,
            num_warps=4,
        )
    finishes = stripe < dim  # else what says how an entry is stored is not read
    keep_kernel[(tokens + windows * finishes,)](
        projected,
        ring,
        rows.ring_write_row,
        columns,
        tokens,
        rows.position,
        *numbers,
        pages.view(torch.bfloat16),
        pages.stride(0),
        DIM=LATENT_DIM,
        SLOTS=slots if finishes else entries_per_page(128),
        BLOCK=max(_LEAST_BLOCK, triton.next_power_of_2(columns)),
        num_warps=4,
    )
