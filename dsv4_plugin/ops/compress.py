"""Compression of every 4 or 128 tokens into one cached entry (docs/model.md §3.3, §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.step_plan import Compression
from ..cache.stores import PackedIndexCache, PackedLatentCache, SlotStore
from ..formats import hadamard
from .operator import HERE, Implementation, operator
from .rms_norm_quant import rms_norm
from .rope import apply_rope


def _items(projected: Tensor, ring: Tensor, rows: Compression) -> Tensor:
    """[N, W, 2, D] fp32, [k | score] of each window's items: this step's where `step_row` >= 0,
    else the ring's; a row of the step and one of the ring are never mixed.

    An item of ratio 4 is the first half of its row in the window after its own, the second in it.
    """
    half = torch.arange(rows.halves, device=ring.device).repeat_interleave(rows.ratio)

    def select(source: Tensor, at: Tensor) -> Tensor:
        # rows of D numbers: k of each half, then scores of each half
        lines = source.reshape(source.shape[0] * 2 * rows.halves, -1)
        k = (at.clamp_min(0) * (2 * rows.halves) + half).unsqueeze(-1)
        both = torch.cat((k, k + rows.halves), -1)
        return lines.index_select(0, both.flatten()).view(*both.shape, -1)

    here = rows.step_row >= 0
    if HERE.static:
        return torch.where(
            here.view(*here.shape, 1, 1),
            select(projected, rows.step_row),
            select(ring, rows.ring_row),
        )
    items = select(projected, rows.step_row)
    window, item = (~here).nonzero(as_tuple=True)
    if window.numel():
        items[window, item] = select(ring, rows.ring_row)[window, item]
    return items


def pool(projected: Tensor, ring: Tensor, rows: Compression, ape: Tensor) -> Tensor:
    """fp32 entries [N, D]: softmax of the scores over each window, per channel, times the values; 0
    where all are -inf.

    `projected` [T, 2·w·D] and `ring` [rows, 2·w·D] hold [k | score] with w = 2 overlapping halves
    for ratio 4 and w = 1 for ratio 128; `ape` [ratio, w·D] is added to the scores by the token's
    place in its own window.
    """
    absent = ((rows.step_row < 0) & (rows.ring_row < 0)).unsqueeze(-1)
    value, score = _items(projected, ring, rows).unbind(2)
    value = value.masked_fill_(absent, 0.0)
    score += ape.view(rows.ratio, rows.halves, -1).transpose(0, 1).flatten(0, 1)
    score.masked_fill_(absent, float("-inf"))
    amax = score.amax(1, keepdim=True)
    p = score.sub_(amax.masked_fill_(amax == float("-inf"), 0.0)).exp_()
    total = p.sum(1)
    return p.mul_(value).sum(1).div_(total.masked_fill_(total == 0, 1.0))


@operator
def compress(
    projected: Tensor,
    ring: Tensor,
    rows: Compression,
    ape: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: SlotStore,
    dtype: torch.dtype,
    rotate: bool,
) -> None:
    """Pools every window that this step completes, norms and rotates the entry, stores it, and
    updates the ring.

    `projected` fp32 [T, 2·w·D] is [k | score] of the step's tokens, scores without `ape`; `ring`
    fp32 is updated in place after it was read; `rows` says which tokens complete a window and where
    its items are; `cos`, `sin` [N, 32] at the first position of each window; `dtype` is that of
    activations (the pooled entry is rounded to it before the norm); `rotate` applies the Hadamard
    rotation (indexer keys). Entries go to `rows.slots` of `cache`. What a padding row stores in
    slot 0, which belongs to nobody, is not defined.
    """
    if rows.token.shape[0]:
        entries = pool(projected, ring, rows, ape).to(dtype)
        entries = apply_rope(rms_norm(entries, norm_weight, eps), cos, sin)
        cache.store(rows.slots, hadamard(entries) if rotate else entries)
    if HERE.static:
        at = rows.ring_write_row.clamp_min(0)
        ring[at] = projected.where((rows.ring_write_row >= 0).unsqueeze(-1), ring[at])
    else:
        kept = (rows.ring_write_row >= 0).nonzero().squeeze(-1)
        ring[rows.ring_write_row[kept]] = projected[kept]


def _needs_packed_bf16(
    projected: Tensor,
    ring: Tensor,
    rows: Compression,
    ape: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: SlotStore,
    dtype: torch.dtype,
    rotate: bool,
) -> str | None:
    packed = PackedIndexCache if rotate else PackedLatentCache
    if not isinstance(cache, packed):
        return f"the cache is a {type(cache).__name__}, not a {packed.__name__}"
    return None if dtype == torch.bfloat16 else f"activations are {dtype}, not bfloat16"


compress.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.compress:compress",
        packages=("triton",),
        fp8=True,
        requires=_needs_packed_bf16,
    )
)
