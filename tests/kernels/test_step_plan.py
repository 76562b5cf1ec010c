"""build_step_plan on the device against its reference: every number of every table."""

from __future__ import annotations

import pytest
import torch
from batches import PAGE, Tables
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_plugin.kernels.triton import step_plan as kernels
from dsv4_plugin.ops import build_step_plan
from dsv4_plugin.ops.step_plan import RING_ROWS

TENSORS = ("position", "request", "query", "window_write", "window")
ROWS = ("token", "position", "slots", "step_row", "ring_row", "ring_write_row")


def assert_same(
    tables: Tables, prefix_lens: list[int], counts: list[int], rings=RING_ROWS, may_shrink=False
) -> None:
    arguments = tables.arguments(prefix_lens, counts) | {"rings": rings, "may_shrink": may_shrink}
    kernel = build_step_plan.implementations["triton"].load()
    got = kernel(**arguments)
    assert_equal(got, arguments)
    tensors = list(got.tensors())
    for tensor in tensors:
        if tensor is not arguments["position"] and tensor is not arguments["request"]:
            tensor.fill_(-7)
    assert kernel(**arguments, out=got) is got
    assert all(now is before for now, before in zip(got.tensors(), tensors, strict=True))
    assert_equal(got, arguments)


def assert_equal(got, arguments: dict) -> None:
    want = build_step_plan.reference(**arguments, static_rows=True)
    rings = arguments["rings"]
    assert (got.max_queries, got.max_seq_len, got.phase) == (
        want.max_queries,
        want.max_seq_len,
        want.phase,
    )
    for name in TENSORS:
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert got.static and (got.dense_slots is None) == (128 not in rings)
    if 128 in rings:
        assert torch.equal(got.dense_slots, want.dense_slots)
    assert got.page_table.shape == want.page_table.shape
    # what lies past a sequence's end is undefined
    for request, length in enumerate(arguments["seq_lens"].tolist()):
        pages = -(-length // PAGE)
        assert torch.equal(got.page_table[request, :pages], want.page_table[request, :pages])
    assert got.compression.keys() == want.compression.keys()
    for ratio, rows in got.compression.items():
        for name in ROWS:
            assert torch.equal(getattr(rows, name), getattr(want.compression[ratio], name)), (
                ratio,
                name,
            )


@pytest.mark.parametrize(
    "prefix_lens, counts",
    [
        ([0], [1]),
        ([0, 0], [300, 5]),
        ([255, 256, 257, 0, 3, 127], [1] * 6),
        ([131, 700, 0], [130, 1, 4]),
        ([252], [9]),
    ],
    ids=["first token", "prefill", "decode", "chunks", "page border"],
)
def test_matches_reference(prefix_lens, counts):
    assert_same(Tables(len(counts), 1024, seed=3), prefix_lens, counts)


@pytest.mark.parametrize("rings", [{}, {4: 8}, {128: 128}, {4: 16, 128: 256}], ids=str)
def test_rings_of_the_host(rings):
    """Draft models have none, speculation doubles them."""
    assert_same(Tables(2, 512), [126, 3], [5, 1], rings)


def test_steps_that_may_be_taken_back():
    for first in (3, 125, 250):
        assert_same(
            Tables(4, 768),
            [first + residue for residue in range(4)],
            [6, 1, 6, 2],
            {4: 16, 128: 256},
            may_shrink=True,
        )


def test_no_rows_and_idle_requests():
    assert_same(Tables(1, 256), [], [])
    assert_same(Tables(3, 256), [5, 3, 0], [0, 1, 4])


def test_freed_windows_are_not_seen():
    """The scheduler frees window pages: their slots map to 0, which is nobody's."""
    tables = Tables(2, 1024)
    tables.full_to_window[tables.slot_table[tables.rows[0], :256].long()] = 0
    assert_same(tables, [300, 511], [3, 1])


def test_requests_are_scanned_in_pieces(monkeypatch):
    monkeypatch.setattr(kernels, "_SCAN", 2)
    assert_same(Tables(7, 256), [3, 0, 7, 126, 127, 11, 2], [1, 5, 1, 2, 1, 1, 2])


def test_table_beyond_two_gigabytes():
    tables = Tables(1, 256)
    row = (1 << 31) // (256 * 4) + 3
    table = torch.empty(row + 1, 256, dtype=torch.int32)  # touched pages only become resident
    table[row] = tables.slot_table[1]
    tables.slot_table, tables.rows = table, torch.tensor([row])
    assert_same(tables, [120], [10])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 40)), min_size=1, max_size=5),
    st.integers(0, 100),
)
def test_any_batch(batch, seed):
    prefix_lens, counts = zip(*batch)
    assert_same(Tables(len(batch), 768, seed), list(prefix_lens), list(counts))
