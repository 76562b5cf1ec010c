"""Pages and caches of the engine, laid out as the host's pool (docs/model.md §4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..cache import (
    INDEX_PAGE_ENTRIES,
    PAGE_TOKENS,
    Caches,
    DenseIndexCache,
    DenseLatentCache,
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from ..cache.stores import SlotStore
from ..config import Geometry, Precision
from ..ops.step_plan import RING_ROWS


class PoolFull(RuntimeError):
    """No free page or request row is left."""


def _latents(
    precision: Precision, pages: int, slots_per_page: int, device: torch.device
) -> SlotStore:
    if precision is Precision.SERVING:
        size = (pages, latent_page_bytes(slots_per_page))
        return PackedLatentCache(
            torch.zeros(size, dtype=torch.uint8, device=device), slots_per_page
        )
    return DenseLatentCache(pages * slots_per_page, precision is Precision.OFFICIAL, device)


def _index_keys(precision: Precision, pages: int, device: torch.device) -> SlotStore:
    if precision is Precision.SERVING:
        return PackedIndexCache(
            torch.zeros(pages, index_page_bytes(), dtype=torch.uint8, device=device)
        )
    return DenseIndexCache(pages * INDEX_PAGE_ENTRIES, precision is Precision.OFFICIAL, device)


def _ring(rows: int, width: int, device: torch.device) -> Tensor:
    # NaN shows a read of a row that nobody wrote.
    return torch.full((rows, width), float("nan"), device=device)


def make_caches(
    geometry: Geometry,
    precision: Precision,
    pages: int,
    requests: int,
    device: torch.device | str = "cpu",
    rings: Mapping[int, int] = RING_ROWS,
) -> Caches:
    """Caches of all layers for `pages` pages of 256 tokens (window pages alike) and `requests`
    request rows, with rings of so many rows by compress ratio."""
    device = torch.device(device)
    caches = Caches()
    for layer, ratio in enumerate(geometry.compress_ratios):
        caches.window[layer] = _latents(precision, pages, PAGE_TOKENS, device)
        if not ratio:
            continue
        caches.compressed[layer] = _latents(precision, pages, entries_per_page(ratio), device)
        halves, owners = (2, pages) if ratio == 4 else (1, requests)
        caches.ring[layer] = _ring(owners * rings[ratio], 2 * halves * geometry.head_dim, device)
        if ratio == 4:
            caches.index[layer] = _index_keys(precision, pages, device)
            caches.index_ring[layer] = _ring(owners * rings[4], 4 * geometry.index_head_dim, device)
    return caches


class Pages:
    """Free pages 1 .. count - 1, taken in the given order; page 0 belongs to nobody."""

    def __init__(self, count: int, seed: int | None = None):
        order = torch.arange(1, count)
        if seed is not None:
            order = order[torch.randperm(count - 1, generator=torch.Generator().manual_seed(seed))]
        self._free = order.flip(0).tolist()

    def take(self, count: int) -> list[int]:
        """`count` pages; raises PoolFull and takes none when fewer are free."""
        if count > len(self._free):
            raise PoolFull(
                f"{count} pages wanted, {len(self._free)} are free; give the engine more pages"
            )
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        self._free.extend(pages)
