"""Greedy choice, ties included."""

from __future__ import annotations

import torch

from dsv4_plugin.ops import sample_greedy


def test_lowest_id_among_the_largest():
    logits = torch.randint(0, 4, (50, 300)).float()
    want = [min(i for i, value in enumerate(row) if value == max(row)) for row in logits.tolist()]
    assert sample_greedy.reference(logits).tolist() == want


def test_one_largest():
    logits = torch.randn(20, 64)
    assert sample_greedy.reference(logits).tolist() == [
        row.index(max(row)) for row in logits.tolist()
    ]


def test_no_rows():
    assert sample_greedy.reference(torch.empty(0, 64)).shape == (0,)


def test_nan_is_never_chosen():
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, nan, 2.0], [nan, -inf, -1.0], [nan, nan, nan], [-inf, -inf, nan]])
    assert sample_greedy.reference(logits).tolist() == [2, 2, 0, 0]
