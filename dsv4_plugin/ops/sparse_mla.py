"""Attention over cached latents, the window and the selected compressed entries in one softmax, and
the inverse RoPE of its output (docs/model.md §3.2, steps 5 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.stores import PackedLatentCache, SlotStore
from .operator import HERE, Implementation, operator
from .rope import apply_rope

# bounds the reference's gathered latents to 16 MiB, which an allocator gets back at no cost
_MAX_GATHERED = 1 << 22
_ROWS = 128
"""Rows whose latents are gathered once for all of them: as many as a window has, twice its
slots."""


def _load(cache: SlotStore, slots: Tensor) -> Tensor:
    """Latents fp32 [n, 512] of `slots` [n], 0 for -1."""
    # Not what slot 0 holds: a NaN there, times a weight of 0, would reach every row with a hole.
    return cache.load(slots).masked_fill_((slots < 0).unsqueeze(-1), 0.0)


def _distinct(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values of `numbers`, from -1 up, and the place of each number among them."""
    marks = numbers.new_zeros(int(numbers.max()) + 2).index_fill_(0, numbers.flatten() + 1, 1)
    place = (marks.cumsum(0) - 1).index_select(0, numbers.flatten() + 1)
    return marks.nonzero().squeeze(-1) - 1, place.view(numbers.shape)


def _in_order_of_appearance(distinct: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The same, so that sums have one order wherever the pages of a request lie."""
    at = torch.arange(place.numel(), device=place.device)
    first = torch.empty_like(distinct).scatter_reduce_(
        0, place.flatten(), at, "amin", include_self=False
    )
    order = first.argsort()
    rank = torch.empty_like(order).index_copy_(0, order, at[: len(order)])
    return distinct[order], rank.index_select(0, place.flatten()).view(place.shape)


def _attend(q: Tensor, keys: Tensor, bias: Tensor, sink: Tensor, softmax_scale: float) -> Tensor:
    """fp32 [N, M, 512]: `q` [N, M, 512] over `keys` [N, K, 512], with `bias` [N, M or 1, K] added
    to the logits and `sink` [M, 1] in the denominator."""
    logits = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=softmax_scale)
    amax = torch.maximum(logits.amax(-1, keepdim=True), sink)
    p = logits.sub_(amax).exp_()
    return (p @ keys).div_(p.sum(-1, keepdim=True).add_((sink - amax).exp_()))


def _row_by_row(
    q: Tensor, lists: list[tuple[SlotStore, Tensor]], sink: Tensor, softmax_scale: float
) -> Tensor:
    """Attention with the latents of each row gathered for it: all shapes are known before."""
    slots = torch.cat([each for _, each in lists], 1)
    out, sink = torch.empty_like(q), sink.unsqueeze(-1)
    bias = torch.zeros_like(slots, dtype=torch.float32).masked_fill_(slots < 0, float("-inf"))
    block = max(1, _MAX_GATHERED // (slots.shape[1] * q.shape[-1]))
    for start in range(0, q.shape[0], block):
        part = slice(start, start + block)
        keys = [
            _load(cache, each[part].flatten()).view(-1, each.shape[1], q.shape[-1])
            for cache, each in lists
        ]
        out[part] = _attend(
            q[part].float(), torch.cat(keys, 1), bias[part].unsqueeze(1), sink, softmax_scale
        )
    return out


def _rows_together(
    q: Tensor, lists: list[tuple[SlotStore, Tensor]], sink: Tensor, softmax_scale: float
) -> Tensor:
    """The same, with the latents that some rows in turn list gathered once for all of them.

    Rows of a prefill share most of their window. A row's bias is the logarithm of how often it
    lists a latent: -inf for one that only others do.
    """
    latents, rows, count = [], [], 0
    for cache, slots in lists:
        distinct, place = _in_order_of_appearance(*_distinct(slots))
        latents.append(_load(cache, distinct))
        rows.append((place + count).masked_fill_(slots < 0, -1))
        count += distinct.shape[0]
    latents, rows = torch.cat(latents), torch.cat(rows, 1)
    if not latents.isfinite().all():  # they must not reach rows that do not list them
        return _row_by_row(q, lists, sink, softmax_scale)
    out, heads = torch.empty_like(q), q.shape[1]
    for start in range(0, q.shape[0], _ROWS):
        part = q[start : start + _ROWS]
        distinct, place = _distinct(rows[start : start + _ROWS])
        listed = part.new_zeros(len(part), distinct.shape[0], dtype=torch.float32)
        listed.scatter_add_(1, place, torch.ones_like(place, dtype=torch.float32))
        bias = listed.log_().masked_fill_(distinct < 0, float("-inf")).repeat_interleave(heads, 0)
        out[start : start + _ROWS] = _attend(
            part.float().view(1, -1, part.shape[-1]),
            latents.index_select(0, distinct.clamp_min(0)).unsqueeze(0),
            bias.unsqueeze(0),
            sink.repeat(len(part)).unsqueeze(-1),
            softmax_scale,
        ).view_as(part)
    return out


@operator
def sparse_mla(
    q: Tensor,
    window_cache: SlotStore,
    window: Tensor,
    compressed_cache: SlotStore | None,
    compressed: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Attention output [T, h, 512] in the dtype of `q` [T, h, 512], rotated back; a latent is both
    key and value.

    `window` int64 [T, 128] and `compressed` int64 [T, K] are slots of their caches, -1 where there
    is none; in a row of `compressed` no slot follows a -1. `sink` fp32 [h] adds e^sink to each
    head's softmax denominator. Logits, softmax and sums are fp32. `cos` and `sin` fp32 [T, 32] are
    the rotation of each row's position, by whose inverse the last 64 channels are multiplied:
    values carry their own. The output is rounded before and after; an implementation may round
    once, after.
    """
    lists = [(window_cache, window)]
    if compressed is not None:
        lists.append((compressed_cache, compressed))
    lists = [(cache, slots) for cache, slots in lists if slots.numel()]
    if not lists:
        return torch.zeros_like(q)
    attention = _row_by_row if HERE.static else _rows_together
    return apply_rope(attention(q, lists, sink, softmax_scale), cos, sin, inverse=True)


def _needs_packed_bf16(
    q: Tensor,
    window_cache: SlotStore,
    window: Tensor,
    compressed_cache: SlotStore | None,
    compressed: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
    cos: Tensor,
    sin: Tensor,
) -> str | None:
    for name, cache in (("window", window_cache), ("compressed", compressed_cache)):
        if cache is not None and not isinstance(cache, PackedLatentCache):
            return f"the {name} cache is a {type(cache).__name__}, not packed"
    return None if q.dtype == torch.bfloat16 else f"q is {q.dtype}, not bfloat16"


def _needs_a_window(
    q: Tensor,
    window_cache: SlotStore,
    window: Tensor,
    compressed_cache: SlotStore | None,
    compressed: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
    cos: Tensor,
    sin: Tensor,
) -> str | None:
    if reason := _needs_packed_bf16(
        q, window_cache, window, compressed_cache, compressed, sink, softmax_scale, cos, sin
    ):
        return reason
    return None if window.shape[1] else "a window of no columns"


def _needs_gluon(
    q: Tensor,
    window_cache: SlotStore,
    window: Tensor,
    compressed_cache: SlotStore | None,
    compressed: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
    cos: Tensor,
    sin: Tensor,
) -> str | None:
    if reason := _needs_a_window(
        q, window_cache, window, compressed_cache, compressed, sink, softmax_scale, cos, sin
    ):
        return reason
    for cache in (window_cache, compressed_cache):
        if cache is not None and cache.slots_per_page & (cache.slots_per_page - 1):
            return f"pages of {cache.slots_per_page} slots, which is no power of two"
    return None


sparse_mla.add(
    Implementation(
        "gluon",
        "dsv4_plugin.kernels.gluon.sparse_mla:sparse_mla",
        archs=("gfx950",),
        requires=_needs_gluon,
    )
)
sparse_mla.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.sparse_mla:sparse_mla",
        packages=("triton",),
        requires=_needs_packed_bf16,
    )
)
sparse_mla.add(
    Implementation(
        "aiter",
        "dsv4_plugin.kernels.aiter.sparse_mla:sparse_mla",
        packages=("amd-aiter",),
        archs=("gfx950",),
        requires=_needs_a_window,
        measured=False,
    )
)
sparse_mla.add(
    Implementation(
        "tilelang",
        "dsv4_plugin.kernels.tilelang.sparse_mla:sparse_mla",
        packages=("tilelang==0.1.12",),
        archs=("gfx950", "sm_90"),  # gfx942 has other FP8 codes, and nothing of it was executed
        requires=_needs_a_window,
        measured=False,
    )
)
