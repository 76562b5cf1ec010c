"""What a GPU's memory holds: weights, and the caches of as many requests as fit beside them."""

from __future__ import annotations

from ..config import Geometry
from .hardware import Hardware
from .layout import Layout
from .weights import resident_bytes

USABLE = 0.9
"""Share of a GPU's memory that a server may use."""
SLOT_BYTES = 584
"""Bytes of one cached latent: 448 FP8, 64 bf16, 7 scales and a pad (docs/model.md §4)."""
INDEX_BYTES = {"fp8": 132, "fp4": 68}
"""Bytes of one indexer key with its scale (docs/model.md §4)."""


def cached_bytes(geometry: Geometry, context: int, index_dtype: str = "fp8") -> float:
    """Cache and compressor state of one request on one GPU that serves it, at `context` tokens
    (docs/model.md §4)."""
    ratios = geometry.compress_ratios[: geometry.num_hidden_layers]
    four, long = ratios.count(4), ratios.count(128)
    window = len(ratios) * min(geometry.sliding_window, context) * SLOT_BYTES
    entries = (
        context / 4 * four * (SLOT_BYTES + INDEX_BYTES[index_dtype])
        + context / 128 * long * SLOT_BYTES
    )
    state = 4 * (
        four * 8 * 2 * 2 * (geometry.head_dim + geometry.index_head_dim)
        + long * 128 * 2 * geometry.head_dim
    )
    return window + entries + state


def resident(geometry: Geometry, layout: Layout, draft: bool = False) -> float:
    """Bytes of backbone weights that one GPU holds, with `draft` of its draft too."""
    return resident_bytes(geometry, layout.shares, mtp=draft)


def largest_batch(
    geometry: Geometry,
    hardware: Hardware,
    layout: Layout,
    context: int,
    index_dtype: str = "fp8",
    draft: bool = False,
) -> int:
    """Requests of `context` tokens that fit beside the weights when 90 % of the memory is used; 0
    when the weights do not."""
    free = USABLE * hardware.memory - resident(geometry, layout, draft)
    return max(int(free // cached_bytes(geometry, context, index_dtype)), 0) * layout.dp
