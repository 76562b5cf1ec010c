"""What comes back from the caches is what went in, rounded as the format says, and nothing else
moves."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_plugin.cache import (
    DenseIndexCache,
    DenseLatentCache,
    PackedIndexCache,
    PackedLatentCache,
    index_page_bytes,
    latent_page_bytes,
)
from dsv4_plugin.formats import round_to_fp4, round_to_fp8

PAGES = 4
STALE = 0x5A


def packed_latents(slots: int) -> PackedLatentCache:
    return PackedLatentCache(
        torch.full((PAGES, latent_page_bytes(slots)), STALE, dtype=torch.uint8), slots
    )


def packed_keys() -> PackedIndexCache:
    return PackedIndexCache(torch.full((PAGES, index_page_bytes()), STALE, dtype=torch.uint8))


CACHES = pytest.mark.parametrize(
    "make, slots, dim",
    [
        (lambda: packed_latents(256), 256 * PAGES, 512),
        (lambda: packed_latents(64), 64 * PAGES, 512),
        (lambda: packed_latents(2), 2 * PAGES, 512),
        (packed_keys, 64 * PAGES, 128),
        (lambda: DenseLatentCache(300, rounded=True), 300, 512),
        (lambda: DenseIndexCache(300, rounded=True), 300, 128),
        (lambda: DenseLatentCache(300, rounded=False), 300, 512),
        (lambda: DenseIndexCache(300, rounded=False), 300, 128),
    ],
    ids=[
        "window",
        "ratio 4",
        "ratio 128",
        "index",
        "rounded latents",
        "rounded keys",
        "latents",
        "keys",
    ],
)


def rounded(cache, values: torch.Tensor) -> torch.Tensor:
    """What a cache keeps of `values`, by its documentation."""
    nope, rope = values[..., :448], values[..., 448:]
    if isinstance(cache, PackedLatentCache):
        return torch.cat((round_to_fp8(nope, 64), rope.bfloat16().float()), -1)
    if isinstance(cache, DenseLatentCache):
        return torch.cat((round_to_fp8(nope, 64), rope), -1) if cache.rounded else values
    if isinstance(cache, PackedIndexCache):
        return round_to_fp8(values, 128)
    return round_to_fp4(values) if cache.rounded else values


@CACHES
@pytest.mark.parametrize("scale", [1.0, 1e-6, 300.0])
def test_round_trip(make, slots, dim, scale):
    cache = make()
    where = torch.randperm(slots - 1)[: slots // 2] + 1
    values = torch.randn(len(where), dim) * scale
    cache.store(where, values)
    assert torch.equal(cache.load(where), rounded(cache, values))


@CACHES
def test_other_slots_keep_their_bytes(make, slots, dim):
    cache = make()
    storage = cache.pages if hasattr(cache, "pages") else cache.values
    everything = torch.arange(slots)
    cache.store(everything, torch.randn(slots, dim))
    before, loaded = storage.clone(), cache.load(everything)
    cache.store(torch.tensor([3]), torch.randn(1, dim))
    others = everything != 3
    assert torch.equal(cache.load(everything)[others], loaded[others])
    assert not torch.equal(cache.load(everything)[3], loaded[3])
    changed = (storage != before).sum().item()
    assert 0 < changed <= 584 if storage.dtype == torch.uint8 else changed <= dim


@CACHES
def test_negative_slots_are_nobodys(make, slots, dim):
    cache = make()
    everything = torch.arange(1, slots)
    cache.store(everything, torch.randn(slots - 1, dim))
    before = cache.load(everything)
    values = torch.randn(1, dim)
    cache.store(torch.tensor([-1]), values)
    assert torch.equal(cache.load(everything), before)
    assert torch.equal(cache.load(torch.tensor([-1])), rounded(cache, values))


@CACHES
def test_no_slots(make, slots, dim):
    cache = make()
    storage = cache.pages if hasattr(cache, "pages") else cache.values
    before = storage.clone()
    cache.store(torch.empty(0, dtype=torch.int64), torch.empty(0, dim))
    assert torch.equal(storage, before) and cache.load(torch.empty(0, dtype=torch.int64)).shape == (
        0,
        dim,
    )


def test_bytes_of_a_latent():
    """448 e4m3 codes, 64 bf16, 7 exponents, as ml_dtypes encodes them."""
    cache, values = packed_latents(64), torch.randn(1, 512) * 3
    cache.store(torch.tensor([70]), values)
    page, x = cache.pages[1].numpy(), values[0].numpy()
    for block in range(7):
        part = x[block * 64 : (block + 1) * 64]
        exponent = int(np.ceil(np.log2(np.abs(part).max() / 448)))
        assert page[64 * 576 + 6 * 8 + block] == exponent + 127
        codes = (part / np.float32(2.0) ** exponent).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        assert np.array_equal(page[6 * 576 + block * 64 : 6 * 576 + (block + 1) * 64], codes)
    assert np.array_equal(
        page[6 * 576 + 448 : 7 * 576], x[448:].astype(ml_dtypes.bfloat16).view(np.uint8)
    )
    assert page[64 * 576 + 6 * 8 + 7] == STALE  # the pad is nobody's


def test_bytes_of_an_index_key():
    cache, values = packed_keys(), torch.randn(1, 128)
    cache.store(torch.tensor([64 + 5]), values)
    page, x = cache.pages[1].numpy(), values[0].numpy()
    scale = np.float32(2.0 ** np.ceil(np.log2(np.abs(x).max() / 448)))
    assert page[64 * 128 + 5 * 4 : 64 * 128 + 6 * 4].view(np.float32)[0] == scale
    assert np.array_equal(
        page[5 * 128 : 6 * 128], (x / scale).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )
