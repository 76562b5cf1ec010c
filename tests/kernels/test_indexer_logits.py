"""indexer_logits in Triton against its reference, at the entries each row sees."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import Tables
from devices import either, interpreted_only, kernel

from dsv4_plugin.cache import PackedIndexCache, index_page_bytes
from dsv4_plugin.kernels.triton import indexer_logits as kernels
from dsv4_plugin.ops import build_step_plan, indexer_logits

BATCHES = {
    "decode": ([1400, 3, 520, 0, 255], [1] * 5),
    "prefill": ([0, 0], [9, 21]),
    "prefill after a prefix, odd groups": ([509, 2, 1030], [5, 1, 7]),
}


def make_case(prefix_lens: list[int], counts: list[int], heads: int = 16, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    tables = Tables(max(len(counts), 1), 1536, seed)
    plan = build_step_plan.reference(**tables.arguments(prefix_lens, counts))
    # e4m3 NaN
    cache = PackedIndexCache(
        torch.full((tables.pages, index_page_bytes()), 0x7F, dtype=torch.uint8)
    )
    for request, length in enumerate(p + c for p, c in zip(prefix_lens, counts)):
        if slots := plan.request_slots(4)[request, : length // 4].tolist():
            cache.store(torch.tensor(slots), torch.randn(len(slots), 128, generator=random) * 3)
    tokens = sum(counts)
    q = (torch.randn(tokens, heads, 128, generator=random) * 50).to(torch.float8_e4m3fn)
    return q, torch.randn(tokens, heads, generator=random) * 2**-6, cache, plan


def assert_same(case: tuple) -> None:
    got, want = (
        kernel(indexer_logits)(*case),
        indexer_logits.reference(*case),
    )
    assert got.shape == want.shape
    seen = want > float("-inf")
    # Products of e4m3 are exact in fp32; n·128 of them are summed in another order: n·128·2^-24 of
    # the sum of magnitudes, of which the largest logit is a fair part.
    # Hopper's FP8 products accumulate in 14 bits, 2^-13 of the largest partial sum.
    step = either(case[0].shape[1] * 128 * 2.0**-24, 2.0**-11)
    tolerance = step * want[seen].abs().max().item() if seen.any() else 0.0
    torch.testing.assert_close(got[seen], want[seen], rtol=0, atol=tolerance)


@interpreted_only
@pytest.mark.parametrize("heads, queries", [(16, 1), (64, 2), (16, 4), (5, 2)])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_matches_reference(batch, heads, queries, monkeypatch):
    """Keys that no row sees are NaN: one that is read and not masked shows."""
    monkeypatch.setattr(kernels, "_config", lambda phase: kernels.Config(queries, 128, 4, 1, 3))
    assert_same(make_case(*BATCHES[batch], heads=heads))


@pytest.mark.parametrize("block", [1, 4, 9])
def test_blocks_of_rows_give_the_whole(block, monkeypatch):
    """A long prefill is scored in blocks of rows, which cut requests and groups of rows
    anywhere."""
    monkeypatch.setattr(kernels, "_config", lambda phase: kernels.Config(2, 128, 4, 1, 3))
    q, weights, cache, plan = make_case(*BATCHES["prefill after a prefix, odd groups"])
    whole = indexer_logits.reference(q, weights, cache, plan)
    for start in range(0, q.shape[0], block):
        rows = slice(start, start + block)
        part = (q[rows], weights[rows], cache, plan.rows(rows))
        # the reference's sums have other lengths
        torch.testing.assert_close(
            indexer_logits.reference(*part), whole[rows], rtol=1e-4, atol=1e-4
        )
        assert_same(part)


@interpreted_only
def test_fnuz_reading_of_the_same_bytes(monkeypatch):
    """gfx942 multiplies FNUZ numbers: half the value for the same byte, and NaN for that of -0."""
    monkeypatch.setattr(kernels, "is_fnuz", lambda: True)
    q, weights, cache, plan = make_case(*BATCHES["decode"])
    q[:, :, ::5] = -0.0
    cache.pages[1:, 0:8192:7] = 0x80
    assert (q.view(torch.uint8) == 0x80).any()
    assert_same((q, weights, cache, plan))


@pytest.mark.parametrize("programs", [1, 3, 50])
def test_any_number_of_programs_covers_all_tiles(programs, monkeypatch):
    monkeypatch.setattr(kernels, "_programs", lambda *_: programs)
    for batch in ("decode", "prefill after a prefix, odd groups"):
        assert_same(make_case(*BATCHES[batch]))


def test_rows_are_scanned_in_pieces(monkeypatch):
    """More rows than one scan takes."""
    monkeypatch.setattr(kernels, "_SCAN", 4)
    assert_same(make_case([1400, 3, 520, 0, 255, 1024], [1] * 6))
    assert_same(make_case([0, 511], [21, 9]))


def test_longest_sequence_costs_nothing():
    """A plan of a captured graph allows for more entries than anyone has: the same logits, the rest
    unwritten."""
    q, weights, cache, plan = make_case(*BATCHES["decode"])
    table = torch.nn.functional.pad(plan.page_table, (0, 40), value=1 << 40)  # a page no pool has
    long = dataclasses.replace(plan, max_seq_len=plan.max_seq_len + 40 * 256, page_table=table)
    got = kernel(indexer_logits)(q, weights, cache, long)
    want = indexer_logits.reference(q, weights, cache, plan)
    seen = want > float("-inf")
    assert got.shape[1] == long.max_seq_len // 4
    torch.testing.assert_close(
        got[:, : want.shape[1]][seen], want[seen], rtol=0, atol=2.0**-11 * want[seen].abs().max()
    )


def test_nothing_visible_and_no_rows():
    assert_same(make_case([0, 1], [1, 1]))
    q, weights, cache, plan = make_case([], [])
    assert kernel(indexer_logits)(q, weights, cache, plan).shape == (0, 0)


def test_page_beyond_two_gigabytes():
    q, weights, cache, plan = make_case([256], [1])
    page = (1 << 31) // index_page_bytes() + 9
    # touched pages only become resident
    pages = torch.empty(page + 1, index_page_bytes(), dtype=torch.uint8)
    pages[page] = cache.pages[plan.page_table[0, 0]]
    far = dataclasses.replace(plan, page_table=torch.full_like(plan.page_table, page))
    got = kernel(indexer_logits)(q, weights, PackedIndexCache(pages), far)
    near = kernel(indexer_logits)(q, weights, cache, plan)
    assert torch.equal(got, near)
