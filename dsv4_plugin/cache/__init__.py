"""Caches of one model: what is stored per slot, in which bytes, and where a token's slots are."""

from .layout import (
    INDEX_PAGE_ENTRIES,
    PAGE_TOKENS,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from .stores import Caches, DenseIndexCache, DenseLatentCache, PackedIndexCache, PackedLatentCache

__all__ = [
    "Caches",
    "DenseIndexCache",
    "DenseLatentCache",
    "PackedIndexCache",
    "PackedLatentCache",
    "INDEX_PAGE_ENTRIES",
    "PAGE_TOKENS",
    "entries_per_page",
    "latent_page_bytes",
    "index_page_bytes",
]
