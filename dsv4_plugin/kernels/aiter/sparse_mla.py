"""Attention over packed latents in aiter's Gluon kernel for gfx950, which reads the same pages."""

from __future__ import annotations

import torch
from aiter.ops.triton.attention.pa_decode_sparse import pa_decode_sparse
from torch import Tensor

from ...cache.layout import LATENT_DATA_BYTES, LATENT_SCALE_BYTES
from ...cache.stores import PackedLatentCache
from ..strides import require_contiguous
from . import require_arguments

require_arguments(pa_decode_sparse, "extra_cache", "extra_indices", "extra_indptr")

_SLOT_BYTES = LATENT_DATA_BYTES + LATENT_SCALE_BYTES


def sparse_mla(
    q: Tensor,
    window_cache: PackedLatentCache,
    window: Tensor,
    compressed_cache: PackedLatentCache | None,
    compressed: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """The operator of the same name for bf16 `q` and packed caches; the inverse RoPE is a pass of
    its own over the last 64 channels."""
    if not q.shape[0]:
        return torch.empty_like(q)
    require_contiguous("sparse_mla", q=q)
    pages = slots = begins = None
    if compressed is not None and compressed.shape[1]:
        pages, slots, begins = _listed(compressed_cache, compressed)
    window_pages, window_slots, window_begins = _listed(window_cache, window)
    out = pa_decode_sparse(
        q,
        unified_kv=window_pages,
        kv_indices=window_slots,
        kv_indptr=window_begins,
        attn_sink=sink,
        softmax_scale=softmax_scale,
        extra_cache=pages,
        extra_indices=slots,
        extra_indptr=begins,
    )
    rope = out[..., -2 * cos.shape[-1] :]
    pairs = torch.view_as_complex(rope.float().unflatten(-1, (-1, 2)))
    rope.copy_(torch.view_as_real(pairs * torch.complex(cos, -sin).unsqueeze(1)).flatten(-2))
    return out


def _listed(cache: PackedLatentCache, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(uint8 pages [n, slots, 584], whose data lie before their scales; all slots int32; int32 [T +
    1] where each row's begin)."""
    shape = cache.pages.shape[0], cache.slots_per_page, _SLOT_BYTES
    pages = cache.pages.as_strided(shape, (cache.pages.stride(0), _SLOT_BYTES, 1))
    rows, width = slots.shape
    begins = torch.arange(0, rows * width + 1, width, dtype=torch.int32, device=slots.device)
    return pages, slots.to(torch.int32).flatten(), begins
