"""Byte layouts and slot arithmetic of the paged caches: the host's DeepSeek-V4 pool (docs/model.md
§4).

A latent slot is 448 e4m3 + 64 bf16 = 576 data bytes and 8 scale bytes (7 ue8m0 and a pad). A page
holds the data of all its slots, then their scales, and is padded to a multiple of 576. An index-key
page holds 64 keys of 128 e4m3, then 64 fp32 scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAGE_TOKENS = 256
WINDOW_SHARE = 0.1
"""Window slots for each token slot of the pool: SGLang's swa_full_tokens_ratio for this model."""
NOPE_DIM = 448
ROPE_DIM = 64
LATENT_DIM = NOPE_DIM + ROPE_DIM
SCALE_BLOCK = 64
LATENT_DATA_BYTES = NOPE_DIM + 2 * ROPE_DIM
LATENT_SCALE_BYTES = NOPE_DIM // SCALE_BLOCK + 1
INDEX_DIM = 128
INDEX_PAGE_ENTRIES = 64


def entries_per_page(ratio: int) -> int:
    """Slots in a page of the window cache (ratio 0 or 1) or of the compressed cache of `ratio`."""
    return PAGE_TOKENS // max(ratio, 1)


def latent_page_bytes(slots: int) -> int:
    """Bytes of a latent page of `slots` slots."""
    used = slots * (LATENT_DATA_BYTES + LATENT_SCALE_BYTES)
    return -(-used // LATENT_DATA_BYTES) * LATENT_DATA_BYTES


def index_page_bytes(entries: int = INDEX_PAGE_ENTRIES) -> int:
    """Bytes of an index-key page."""
    return entries * (INDEX_DIM + 4)


def latent_views(pages: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of uint8 `pages` [n, page_bytes]: nope bytes [n, slots, 448], rope bytes [n, slots,
    128], scales [n, slots, 7]."""
    count, page_bytes = pages.shape
    data = pages.as_strided(
        (count, slots, LATENT_DATA_BYTES),
        (page_bytes, LATENT_DATA_BYTES, 1),
        pages.storage_offset(),
    )
    scales = pages.as_strided(
        (count, slots, LATENT_SCALE_BYTES - 1),
        (page_bytes, LATENT_SCALE_BYTES, 1),
        pages.storage_offset() + slots * LATENT_DATA_BYTES,
    )
    return data[..., :NOPE_DIM], data[..., NOPE_DIM:], scales


def index_views(pages: Tensor, entries: int = INDEX_PAGE_ENTRIES) -> tuple[Tensor, Tensor]:
    """Views of uint8 `pages` [n, page_bytes]: key bytes [n, entries, 128] and scale bytes [n,
    entries, 4]."""
    count, page_bytes = pages.shape
    keys = pages.as_strided(
        (count, entries, INDEX_DIM), (page_bytes, INDEX_DIM, 1), pages.storage_offset()
    )
    scales = pages.as_strided(
        (count, entries, 4), (page_bytes, 4, 1), pages.storage_offset() + entries * INDEX_DIM
    )
    return keys, scales


def latent_rows(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous uint8 `pages` [n, page_bytes] as rows that latent_row_numbers counts: data int64
    [.., 72], words that are copied at once, and scales uint8 [.., 7]."""
    scales = pages.view(-1, LATENT_SCALE_BYTES)[:, : LATENT_SCALE_BYTES - 1]
    return pages.view(torch.int64).view(-1, LATENT_DATA_BYTES // 8), scales


def latent_row_numbers(slots: Tensor, slots_per_page: int) -> tuple[Tensor, Tensor]:
    """(data row, scale row) of each of the int64 `slots` in latent_rows."""
    size, page = latent_page_bytes(slots_per_page), slots // slots_per_page
    data = torch.add(slots, page, alpha=size // LATENT_DATA_BYTES - slots_per_page)
    scale = torch.add(slots, page, alpha=size // LATENT_SCALE_BYTES - slots_per_page)
    return data, scale + slots_per_page * LATENT_DATA_BYTES // LATENT_SCALE_BYTES


def index_rows(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous uint8 `pages` [n, 8448] as rows that index_row_numbers counts: keys uint8 [..,
    128] and scales fp32 [.., 1]."""
    return pages.view(-1, INDEX_DIM), pages.view(torch.float32).view(-1, 1)


def index_row_numbers(slots: Tensor) -> tuple[Tensor, Tensor]:
    """(key row, scale row) of each of the int64 `slots` in index_rows."""
    size, page = index_page_bytes(), slots // INDEX_PAGE_ENTRIES
    key = torch.add(slots, page, alpha=size // INDEX_DIM - INDEX_PAGE_ENTRIES)
    scale = torch.add(slots, page, alpha=size // 4 - INDEX_PAGE_ENTRIES)
    return key, scale + INDEX_PAGE_ENTRIES * INDEX_DIM // 4


def entry_slots(page_table: Tensor, entries: Tensor, ratio: int) -> Tensor:
    """Slots of compressed entries: `page_table` [..., pages] (page of each 256 tokens), `entries`
    [..., n] int64."""
    per_page = entries_per_page(ratio)
    return page_table.gather(-1, entries // per_page) * per_page + entries % per_page


def window_ring_row(window_slot: Tensor, ring: int) -> Tensor:
    """Row of the ratio-4 compressor ring that belongs to a token's window slot."""
    return window_slot // PAGE_TOKENS * ring + window_slot % ring


def request_ring_row(request_row: Tensor, position: Tensor, ring: int) -> Tensor:
    """Row of the ratio-128 compressor ring of a request's token."""
    return request_row * ring + position % ring
