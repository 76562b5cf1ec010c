"""Selection against Python's sort (docs/model.md §3.4)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_plugin.ops import topk_select


def naive(logits: torch.Tensor, visible: torch.Tensor, topk: int) -> list[list[int]]:
    width = min(topk, logits.shape[1])
    result = []
    for row, count in zip(logits.tolist(), visible.tolist()):
        best = sorted(sorted(range(count), key=lambda j: (-row[j], j))[:topk])
        result.append(best + [-1] * (width - len(best)))
    return result


def check(logits: torch.Tensor, visible: torch.Tensor, topk: int) -> None:
    got = topk_select.reference(logits, visible, topk)
    assert got.dtype == torch.int64 and got.tolist() == naive(logits, visible, topk)


@pytest.mark.parametrize("topk", [1, 5, 16, 64, 100])
def test_distinct_logits(topk):
    check(torch.randn(40, 64), torch.randint(0, 65, (40,)), topk)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.data())
def test_ties_go_to_the_lowest_entries(data):
    entries, topk = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    rows = data.draw(st.integers(0, 4))
    values = st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -1e30, 1e30]),
        min_size=entries,
        max_size=entries,
    )
    logits = torch.tensor([data.draw(values) for _ in range(rows)]).view(rows, entries)
    visible = torch.tensor(
        [data.draw(st.integers(0, entries)) for _ in range(rows)], dtype=torch.int64
    )
    check(logits, visible, topk)


def test_all_zero_after_relu():
    """Rows whose scores all died in the ReLU tie exactly; the first entries win."""
    check(torch.zeros(3, 50), torch.tensor([50, 20, 7]), 16)


@pytest.mark.parametrize("stale", [float("nan"), float("inf"), 1e38])
def test_what_a_row_does_not_see_cannot_win(stale):
    logits, visible = torch.randn(30, 40), torch.randint(0, 41, (30,))
    want = naive(logits, visible, 16)
    logits[torch.arange(40) >= visible.unsqueeze(-1)] = stale
    assert topk_select.reference(logits, visible, 16).tolist() == want


def test_no_rows_and_no_entries():
    assert topk_select.reference(
        torch.empty(0, 40), torch.empty(0, dtype=torch.int64), 16
    ).shape == (0, 16)
    assert topk_select.reference(
        torch.empty(0, 0), torch.empty(0, dtype=torch.int64), 16
    ).shape == (0, 0)
    assert topk_select.reference(
        torch.empty(5, 0), torch.zeros(5, dtype=torch.int64), 16
    ).shape == (5, 0)
