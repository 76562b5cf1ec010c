"""qk_norm_rope_store in Triton against its reference: bytes of the cache and bits of the
queries."""

from __future__ import annotations

import pytest
import torch
from devices import either, kernel

from dsv4_plugin.cache import PackedLatentCache, latent_page_bytes
from dsv4_plugin.ops import qk_norm_rope_store
from dsv4_plugin.ops.rope import rotation

EPS = 1e-6
POISON = 0xA5


def make_cache(pages: int, slots_per_page: int) -> PackedLatentCache:
    return PackedLatentCache(
        torch.full((pages, latent_page_bytes(slots_per_page)), POISON, dtype=torch.uint8),
        slots_per_page,
    )


def make_inputs(tokens: int, heads: int, seed: int = 0, scale: float = 3.0) -> tuple:
    random = torch.Generator().manual_seed(seed)
    q = (torch.randn(tokens, heads, 512, generator=random) * scale).bfloat16()
    kv = (torch.randn(tokens, 512, generator=random) * scale).bfloat16()
    weight = torch.randn(512, generator=random).bfloat16()
    positions = torch.randint(0, 1 << 20, (tokens,), generator=random)
    return q, kv, weight, EPS, *rotation(positions, 160000 ** -(torch.arange(0, 64, 2) / 64))


def run_both(inputs: tuple, slots: torch.Tensor, pages: int, slots_per_page: int):
    """((queries, cache) of the kernel, of the reference)."""
    results = []
    for run in (kernel(qk_norm_rope_store), qk_norm_rope_store.reference):
        cache = make_cache(pages, slots_per_page)
        results.append((run(*inputs, slots, cache), cache))
    return results


def everything(cache: PackedLatentCache) -> torch.Tensor:
    """fp32 [slots, 512] of all slots, poisoned ones too."""
    return cache.load(torch.arange(cache.pages.shape[0] * cache.slots_per_page))


def assert_same_but_for_rounding(
    got: torch.Tensor, want: torch.Tensor, step: float, ties: float = 0.0
):
    # The mean of squares is summed in another order, which moves the norm by some 1e-7: a value
    # that lies that close to the border of two representable ones rounds to the other, one step
    # away. `ties` is the share of values that lie on it.
    assert (got != want).float().mean() < either(2e-3, 5e-3) + ties
    # Where e4m3 is subnormal its step is scale / 512, below 2^-16 of the largest value of the
    # block. A tie that falls otherwise before the rotation moves both values of its pair.
    least = step if ties else 2.0**-16
    torch.testing.assert_close(
        got.float(), want.float(), rtol=step, atol=least * want.abs().max().item()
    )


BF16_STEP, FP8_STEP = 2.0**-7, 2.0**-3


@pytest.mark.parametrize("tokens, heads, slots_per_page", [(5, 4, 256), (3, 16, 64), (1, 11, 2)])
def test_matches_reference(tokens, heads, slots_per_page):
    slots = torch.randperm(3 * slots_per_page)[:tokens]
    (q, cache), (want_q, want) = run_both(make_inputs(tokens, heads), slots, 3, slots_per_page)
    assert_same_but_for_rounding(q, want_q, BF16_STEP)
    assert_same_but_for_rounding(everything(cache), everything(want), FP8_STEP)
    assert (cache.pages != want.pages).float().mean() < either(
        2e-3, 5e-3
    )  # nothing beside the slots is touched


def test_no_rows_touch_nothing():
    (q, cache), _ = run_both(make_inputs(0, 8), torch.zeros(0, dtype=torch.int64), 1, 256)
    assert q.shape == (0, 8, 512)
    assert (cache.pages == POISON).all()


def test_negative_slot_is_not_stored():
    inputs = make_inputs(2, 2)
    (_, cache), (_, want) = run_both(inputs, torch.tensor([-1, 300]), 2, 256)
    assert (cache.pages[0] == POISON).all()
    assert_same_but_for_rounding(
        cache.load(torch.tensor([300])), want.load(torch.tensor([300])), FP8_STEP
    )


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1e17])
def test_extreme_magnitudes(scale):
    """Zeros, squares that underflow and squares near the end of fp32 come out as the
    reference's."""
    slots = torch.tensor([1, 2])
    (q, cache), (want_q, want) = run_both(make_inputs(2, 2, scale=scale), slots, 1, 256)
    # Squares that vanish leave the norm at eps^-1/2 = 1000 = 125 * 8, give or take a last bit: a
    # product of 8 by 7 bits has 7 bits past bf16's, and is a tie once in 2^7.
    ties = 2 * 2**-7 if scale == 1e-30 else 0.0
    assert_same_but_for_rounding(q, want_q, BF16_STEP, ties)
    assert_same_but_for_rounding(cache.load(slots), want.load(slots), FP8_STEP)


def test_latent_in_a_strided_tensor():
    inputs = list(make_inputs(3, 2))
    wide = torch.full((3, 700), float("nan"), dtype=torch.bfloat16)
    wide[:, 100:612] = inputs[1]
    expected = run_both(tuple(inputs), torch.arange(1, 4), 1, 256)
    inputs[1] = wide[:, 100:612]
    strided = run_both(tuple(inputs), torch.arange(1, 4), 1, 256)
    assert torch.equal(strided[0][1].pages, expected[0][1].pages)


def test_slot_beyond_two_gigabytes():
    """A slot whose byte offset does not fit in 32 bits is written where it belongs."""
    page_bytes = latent_page_bytes(256)
    page = (1 << 31) // page_bytes + 3
    # touched pages only become resident
    pages = torch.empty(page + 1, page_bytes, dtype=torch.uint8)
    run = kernel(qk_norm_rope_store)
    inputs = make_inputs(1, 1)
    run(*inputs, torch.tensor([page * 256 + 7]), PackedLatentCache(pages, 256))
    (_, small), _ = run_both(inputs, torch.tensor([7]), 1, 256)
    slot = slice(7 * 576, 8 * 576)
    assert torch.equal(pages[page, slot], small.pages[0, slot])
