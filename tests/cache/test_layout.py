"""Byte layouts against the addresses that docs/model.md §4 gives, and against the host's own
description of its pages."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.cache import (
    INDEX_PAGE_ENTRIES,
    PAGE_TOKENS,
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from dsv4_plugin.cache.layout import entry_slots, index_views, latent_views


@pytest.mark.parametrize("ratio, slots, size", [(0, 256, 149760), (4, 64, 37440), (128, 2, 1728)])
def test_latent_pages(ratio, slots, size):
    assert entries_per_page(ratio) == slots and latent_page_bytes(slots) == size
    assert size % 576 == 0 and size >= slots * 584


def test_index_page():
    assert index_page_bytes() == 64 * 132 == 8448 and INDEX_PAGE_ENTRIES == 64


@pytest.mark.parametrize("slots", [256, 64, 2])
def test_every_byte_of_a_latent_page_is_where_the_host_has_it(slots):
    size = latent_page_bytes(slots)
    pages = torch.zeros(3, size, dtype=torch.uint8)
    nope, rope, scales = latent_views(pages, slots)
    slot = slots - 1
    nope[1, slot], rope[1, slot], scales[1, slot] = 1, 2, 3
    want = torch.zeros(size, dtype=torch.uint8)
    want[slot * 576 : slot * 576 + 448] = 1
    want[slot * 576 + 448 : slot * 576 + 576] = 2
    want[slots * 576 + slot * 8 : slots * 576 + slot * 8 + 7] = 3  # the eighth byte is a pad
    assert torch.equal(pages[1], want) and not pages[0].any() and not pages[2].any()


def test_every_byte_of_an_index_page_is_where_the_host_has_it():
    pages = torch.zeros(3, index_page_bytes(), dtype=torch.uint8)
    keys, scales = index_views(pages)
    keys[1, 63], scales[1, 63] = 1, 2
    want = torch.zeros(index_page_bytes(), dtype=torch.uint8)
    want[63 * 128 : 64 * 128] = 1
    want[64 * 128 + 63 * 4 : 64 * 128 + 64 * 4] = 2
    assert torch.equal(pages[1], want) and not pages[0].any() and not pages[2].any()


@pytest.mark.parametrize("slots", [256, 64, 2])
def test_the_host_describes_the_same_page(slots):
    layout = pytest.importorskip("sglang.kernels.ops.attention.dsv4.kv_layout").KVLayout.V4
    assert layout.page_bytes(slots) == latent_page_bytes(slots)
    nope, rope, scales = latent_views(
        torch.zeros(1, latent_page_bytes(slots), dtype=torch.uint8), slots
    )
    assert layout.row_addressing(slots) == (
        nope.stride(1),
        scales.storage_offset(),
        scales.stride(1),
    )
    assert (
        layout.data_bytes == nope.shape[2] + rope.shape[2]
        and layout.tile_size * scales.shape[2] == nope.shape[2]
    )


def test_views_of_a_part_of_a_buffer():
    """The host may hand out a slice of a larger buffer: views start where the slice does."""
    buffer = torch.zeros(4, latent_page_bytes(64), dtype=torch.uint8)
    nope, _, _ = latent_views(buffer[2:], 64)
    nope[0, 0] = 9
    assert (buffer[2, :448] == 9).all() and not buffer[:2].any() and not buffer[3].any()


@pytest.mark.parametrize("ratio", [4, 128])
def test_entry_slots(ratio):
    table = torch.tensor([[7, 2, 9], [1, 3, 4]])
    for request, pages in enumerate(table.tolist()):
        for entry in range(3 * PAGE_TOKENS // ratio):
            last = ratio * entry + ratio - 1  # the slot is that of any token of the window, divided
            full = pages[last // PAGE_TOKENS] * PAGE_TOKENS + last % PAGE_TOKENS
            assert (
                entry_slots(table, torch.tensor([[entry], [entry]]), ratio)[request, 0]
                == full // ratio
            )


@pytest.mark.parametrize(
    "make, size, dim",
    [
        (lambda pages: PackedLatentCache(pages, 256), latent_page_bytes(256), 512),
        (PackedIndexCache, index_page_bytes(), 128),
    ],
)
def test_slots_beyond_two_gigabytes(make, size, dim):
    # only touched pages become resident
    pages = torch.empty((1 << 31) // size + 3, size, dtype=torch.uint8)
    cache = make(pages)
    per_page = 256 if dim == 512 else 64
    slots = torch.tensor(
        [(len(pages) - 1) * per_page + per_page - 1, (len(pages) - 2) * per_page, 5]
    )
    values = torch.ones(3, dim) * torch.tensor([[1.0], [2.0], [4.0]])
    cache.store(slots, values)
    assert torch.equal(cache.load(slots), values)
