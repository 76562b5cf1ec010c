"""Attention over packed latents in the kernels that SGLang has for these pages: FlashMLA on NVIDIA,
its Triton kernels elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import device
from ...cache.layout import LATENT_DATA_BYTES, LATENT_DIM, LATENT_SCALE_BYTES
from ...cache.stores import PackedLatentCache
from ...ops.rope import apply_rope

FLASH_MLA = device.arch().startswith("sm_")
if FLASH_MLA:
    from sglang.kernels.ops.attention.flash_mla_interface import (
        flash_mla_with_kvcache as attend,
    )
    from sglang.kernels.ops.attention.flash_mla_interface import get_mla_metadata
else:
    from sglang.kernels.ops.attention.dsv4.triton_sparse_decode import (
        triton_fp8_attention_fwd as attend,
    )

_HEADS = 64
"""FlashMLA takes 64 heads or 128."""
_COLUMNS = 64
"""What the width of a list of slots is a multiple of."""


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
    """The operator of the same name for bf16 `q` and packed caches; the inverse RoPE is passes of
    its own, and FlashMLA's heads are filled up with zeros."""
    rows, heads, _ = q.shape
    if not rows:
        return torch.empty_like(q)
    if compressed is not None and not compressed.shape[1]:
        compressed = None
    if FLASH_MLA:
        q, sink = F.pad(q, (0, 0, 0, -heads % _HEADS)), F.pad(sink, (0, -heads % _HEADS))
    out, _ = attend(
        q=q.unsqueeze(1),
        k_cache=_pages(window_cache),
        block_table=None,
        cache_seqlens=None,
        head_dim_v=LATENT_DIM,
        tile_scheduler_metadata=get_mla_metadata()[0] if FLASH_MLA else None,
        softmax_scale=softmax_scale,
        is_fp8_kvcache=True,
        indices=_slots(window),
        attn_sink=sink,
        extra_k_cache=None if compressed is None else _pages(compressed_cache),
        extra_indices_in_kvcache=None if compressed is None else _slots(compressed),
    )
    return apply_rope(out.squeeze(1)[:, :heads], cos, sin, inverse=True)


def _pages(cache: PackedLatentCache) -> Tensor:
    """uint8 [pages, slots, 1, 584]: a page's data, then its scales, as the kernels address them."""
    size = LATENT_DATA_BYTES + LATENT_SCALE_BYTES
    shape = cache.pages.shape[0], cache.slots_per_page, 1, size
    return cache.pages.as_strided(shape, (cache.pages.stride(0), size, size, 1))


def _slots(slots: Tensor) -> Tensor:
    """int32 [T, 1, columns], filled up with -1."""
    return F.pad(slots.to(torch.int32), (0, -slots.shape[1] % _COLUMNS), value=-1).unsqueeze(1)
