"""Attention over cached latents, the window and the selected compressed entries in one softmax, and
the inverse RoPE of its output (docs/model.md §3.2, steps 5 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.stores import PackedLatentCache, SlotStore
from .operator import Implementation, operator
from .rope import apply_rope

# bounds the reference's gathered latents to 16 MiB, which an allocator gets back at no cost
_MAX_GATHERED = 1 << 22


def _load_once(cache: SlotStore, slots: Tensor) -> tuple[Tensor, Tensor]:
    """(latents [n, 512] of the distinct `slots`, 0 for -1, row of each slot in them): shared keys
    are decoded once."""
    distinct, row = slots.unique(return_inverse=True)
    # Not what slot 0 holds: a NaN there, times a weight of 0, would reach every row with a hole.
    return cache.load(distinct).masked_fill_((distinct < 0).unsqueeze(-1), 0.0), row


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
    latents, rows = _load_once(window_cache, window)
    slots = window
    if compressed is not None and compressed.shape[1]:
        more, more_rows = _load_once(compressed_cache, compressed)
        rows = torch.cat((rows, more_rows + latents.shape[0]), 1)
        latents, slots = torch.cat((latents, more)), torch.cat((window, compressed), 1)
    out = torch.empty_like(q)
    block = max(1, _MAX_GATHERED // (slots.shape[1] * latents.shape[-1]))
    for start in range(0, q.shape[0], block):
        part = slice(start, start + block)
        keys = latents[rows[part]]
        logits = (q[part].float() @ keys.transpose(1, 2)) * softmax_scale
        logits.masked_fill_((slots[part] < 0).unsqueeze(1), float("-inf"))
        amax = torch.maximum(logits.amax(-1), sink)
        p = (logits - amax.unsqueeze(-1)).exp_()
        denominator = p.sum(-1) + (sink - amax).exp()
        out[part] = ((p @ keys) / denominator.unsqueeze(-1)).to(q.dtype)
    return apply_rope(out, cos, sin, inverse=True)


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
    if reason := _needs_packed_bf16(
        q, window_cache, window, compressed_cache, compressed, sink, softmax_scale, cos, sin
    ):
        return reason
    for cache in (window_cache, compressed_cache):
        if cache is not None and cache.slots_per_page & (cache.slots_per_page - 1):
            return f"pages of {cache.slots_per_page} slots, which is no power of two"
    return None if window.shape[1] else "a window of no columns"


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
