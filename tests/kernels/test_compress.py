"""compress in Triton against its reference, over plans of ragged batches with poisoned rings and
caches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import Tables
from devices import either, kernel

from dsv4_plugin.cache import (
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from dsv4_plugin.ops import build_step_plan, compress
from dsv4_plugin.ops.rope import rotation

EPS = 1e-6
FREQUENCIES = 160000 ** -(torch.arange(0, 64, 2) / 64)
KINDS = pytest.mark.parametrize("ratio, dim", [(4, 512), (4, 128), (128, 512)])
BATCHES = {
    "prefill": ([0, 0], [132, 6]),
    "chunk in the middle of windows": ([250, 122, 7], [13, 10, 1]),
    "decode": ([3, 127, 510, 255, 0, 4], [1] * 6),
}


def make_cache(ratio: int, dim: int, pages: int):
    if dim == 128:
        return PackedIndexCache(torch.full((pages, index_page_bytes()), 0xA5, dtype=torch.uint8))
    slots = entries_per_page(ratio)
    return PackedLatentCache(
        torch.full((pages, latent_page_bytes(slots)), 0xA5, dtype=torch.uint8), slots
    )


class Case:
    """Inputs of one call; rings hold data where the step may read and NaN elsewhere."""

    def __init__(
        self,
        ratio: int,
        dim: int,
        prefix_lens: list[int],
        counts: list[int],
        static_rows: bool = False,
        scale: float = 1.0,
    ):
        random = torch.Generator().manual_seed(dim + ratio)
        tables = Tables(max(len(counts), 1), 768)
        self.plan = build_step_plan.reference(
            **tables.arguments(prefix_lens, counts), static_rows=static_rows
        )
        self.rows, self.ratio, self.dim, self.pages = (
            self.plan.compression[ratio],
            ratio,
            dim,
            tables.pages,
        )
        width = dim * self.rows.halves
        self.projected = torch.randn(sum(counts), 2 * width, generator=random) * scale
        owners = tables.pages * 8 if ratio == 4 else (len(counts) + 1) * 128
        self.ring = torch.full((owners, 2 * width), float("nan"))
        read = self.rows.ring_row[self.rows.ring_row >= 0]
        self.ring[read] = torch.randn(len(read), 2 * width, generator=random) * scale
        self.ape = torch.randn(ratio, width, generator=random)
        self.weight = torch.randn(dim, generator=random).bfloat16()

    def run(self, implementation):
        """(ring, cache) after the call."""
        ring, cache = self.ring.clone(), make_cache(self.ratio, self.dim, self.pages)
        cos, sin = rotation(self.rows.position, FREQUENCIES)
        implementation(
            self.projected,
            ring,
            self.rows,
            self.ape,
            self.weight,
            EPS,
            cos,
            sin,
            cache,
            torch.bfloat16,
            self.dim == 128,
        )
        return ring, cache

    def run_both(self):
        return self.run(kernel(compress)), self.run(compress.reference)


def assert_same(case: Case) -> None:
    (ring, cache), (want_ring, want) = case.run_both()
    # copies, NaN rows included
    assert torch.equal(ring.view(torch.int32), want_ring.view(torch.int32))
    slots = case.rows.slots[case.rows.slots > 0]
    got, expected = cache.load(slots), want.load(slots)
    if not len(slots):
        assert (cache.pages == 0xA5).all()
        return
    # Sums in another order move a value by some 1e-6 of it, so a few bf16 and FP8 roundings fall to
    # the neighbour: one step of e4m3, 2^-3, where nothing mixes. A flipped bf16 rounding of one
    # channel reaches all 128 index channels through the rotation, where it is below the FP8 step of
    # the largest: 2^-4 of the amax.
    assert (got != expected).float().mean() < either(2e-2 if case.dim == 128 else 5e-3, 3e-2)
    amax = expected.abs().amax(-1, keepdim=True)
    assert ((got - expected).abs() <= 2**-3 * expected.abs() + either(2**-8, 2**-7) * amax).all()
    untouched = torch.ones(cache.pages.shape[0], dtype=torch.bool)
    untouched[slots // (64 if case.ratio == 4 else 2)] = False
    assert (cache.pages[untouched] == 0xA5).all()


@KINDS
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_matches_reference(ratio, dim, batch):
    assert_same(Case(ratio, dim, *BATCHES[batch]))


@KINDS
def test_padding_rows_store_nothing(ratio, dim):
    case = Case(ratio, dim, *BATCHES["decode"], static_rows=True)
    assert (case.rows.position < 0).any()
    assert_same(case)


@KINDS
def test_a_batch_that_completes_nothing_only_keeps(ratio, dim):
    assert_same(Case(ratio, dim, [0, 0], [2, 1]))


@KINDS
def test_no_rows(ratio, dim):
    assert_same(Case(ratio, dim, [], []))


@KINDS
@pytest.mark.parametrize("scale", [0.0, 1e-20, 30.0])
def test_extreme_magnitudes(ratio, dim, scale):
    """Scores of 30 sigma make the softmax a choice; zeros and tiny values reach the floor of the
    FP8 scale."""
    assert_same(Case(ratio, dim, [0], [3 * ratio if ratio == 4 else ratio], scale=scale))


@KINDS
def test_window_without_any_score_gives_zero(ratio, dim):
    """Empty state is k = 0, score = -inf: a window of nothing else must give 0, not NaN."""
    case = Case(ratio, dim, [0], [2 * ratio if ratio == 4 else ratio])
    case.projected[:, case.projected.shape[1] // 2 :] = float("-inf")
    (_, cache), _ = case.run_both()
    assert (cache.load(case.rows.slots) == 0).all()


@pytest.mark.parametrize("ratio", [4, 128])
def test_ring_is_read_before_it_is_written(ratio):
    """Kept rows of the step land on ring rows that its windows read; swapped order would change the
    entries."""
    case = Case(ratio, 512, [ratio - 2], [ratio])
    read, written = (
        case.rows.ring_row[case.rows.ring_row >= 0],
        case.rows.ring_write_row[case.rows.ring_write_row >= 0],
    )
    alias = dataclasses.replace(case.rows, ring_write_row=case.rows.ring_write_row.clone())
    alias.ring_write_row[0] = read[0]
    if read[0] in written:
        alias.ring_write_row[case.rows.ring_write_row == read[0]] = -1
        alias.ring_write_row[0] = read[0]
    case.rows = alias
    assert_same(case)


def test_ring_row_beyond_two_gigabytes():
    case = Case(4, 512, [6], [3])
    row = (1 << 31) // (2048 * 4) + 5
    case.ring = torch.empty(row + 1, 2048)  # touched pages only become resident
    case.ring[case.rows.ring_row[case.rows.ring_row >= 0]] = 1.0
    kept = case.rows.ring_write_row.clone()
    kept[-1] = row
    case.rows = dataclasses.replace(case.rows, ring_write_row=kept)
    cos, sin = rotation(case.rows.position, FREQUENCIES)
    kernel(compress)(
        case.projected,
        case.ring,
        case.rows,
        case.ape,
        case.weight,
        EPS,
        cos,
        sin,
        make_cache(4, 512, case.pages),
        torch.bfloat16,
        False,
    )
    assert torch.equal(case.ring[row], case.projected[-1])
