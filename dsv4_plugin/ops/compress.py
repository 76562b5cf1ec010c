"""Compression of every 4 or 128 tokens into one cached entry (docs/model.md §3.3, §4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.step_plan import Compression
from ..cache.stores import PackedIndexCache, PackedLatentCache, SlotStore
from ..formats import hadamard
from .operator import Implementation, operator
from .rms_norm_quant import rms_norm
from .rope import apply_rope


def _window(projected: Tensor, ring: Tensor, step_row: Tensor, ring_row: Tensor) -> Tensor:
    """Rows [N, W, ...] of each window: this step's where `step_row` >= 0, else the ring's; never
    both, never mixed."""
    from_step = (step_row >= 0).view(step_row.shape + (1,) * (projected.dim() - 1))
    return torch.where(from_step, projected[step_row.clamp_min(0)], ring[ring_row.clamp_min(0)])


def pool(projected: Tensor, ring: Tensor, rows: Compression, ape: Tensor) -> Tensor:
    """fp32 entries [N, D]: softmax of the scores over each window, per channel, times the values; 0
    where all are -inf.

    `projected` [T, 2·w·D] and `ring` [rows, 2·w·D] hold [k | score] with w = 2 overlapping halves
    for ratio 4 and w = 1 for ratio 128; `ape` [ratio, w·D] is added to the scores by the token's
    place in its own window.
    """
    ratio, halves = rows.ratio, rows.halves
    width = ape.shape[-1] // halves
    projected = projected.unflatten(-1, (2, halves, width))
    ring = ring.unflatten(-1, (2, halves, width))
    values, scores = [], []
    for half in range(halves):
        items = slice(half * ratio, (half + 1) * ratio)
        window = _window(
            projected[:, :, half],
            ring[:, :, half],
            rows.step_row[:, items],
            rows.ring_row[:, items],
        )
        values.append(window[:, :, 0])
        scores.append(window[:, :, 1] + ape.unflatten(-1, (halves, width))[:, half])
    present = ((rows.step_row >= 0) | (rows.ring_row >= 0)).unsqueeze(-1)
    value = torch.cat(values, 1).masked_fill(~present, 0.0)
    score = torch.cat(scores, 1).masked_fill(~present, float("-inf"))
    amax = score.amax(1, keepdim=True)
    p = (score - amax.masked_fill(amax == float("-inf"), 0.0)).exp()
    total = p.sum(1)
    return (p * value).sum(1) / total.masked_fill(total == 0, 1.0)


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
    kept = rows.ring_write_row >= 0
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
