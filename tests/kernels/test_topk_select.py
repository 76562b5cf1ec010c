"""topk_select in Triton against its reference: the same numbers exactly, whatever the values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_plugin.kernels.triton import topk_select as kernels
from dsv4_plugin.ops import topk_select


def assert_same(logits: torch.Tensor, visible: list[int], topk: int) -> None:
    """Logits that a row does not see are poisoned with inf, the largest there is."""
    seen = torch.tensor(visible, dtype=torch.int64)
    poisoned = logits.masked_fill(torch.arange(logits.shape[1]) >= seen.unsqueeze(-1), float("inf"))
    got = topk_select.implementations["triton"].load()(poisoned, seen, topk)
    assert torch.equal(got, topk_select.reference(logits, seen, topk))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entries", [1, 16, 17, 777, 1025, 8192])
def test_one_chunk(entries):
    assert_same(normal(3, entries), [entries, entries // 2, 0], 16)


@pytest.mark.parametrize("topk", [512, 1024])
def test_released_sizes(topk):
    assert_same(normal(3, 2500), [2500, topk + 1, topk], topk)


@pytest.mark.parametrize("logits", [
    torch.zeros(2, 3000), torch.full((2, 3000), -1e30),
    torch.arange(6000.0).view(2, 3000), -torch.arange(6000.0).view(2, 3000),
    normal(2, 3000).round(), normal(2, 3000) * 1e-40, normal(2, 3000).mul(40).exp(), -normal(2, 3000).mul(40).exp(),
    torch.where(normal(2, 3000) > 0, 0.0, -0.0),
    normal(2, 3000).masked_fill(normal(2, 3000, seed=1) > -1, float("-inf")),
], ids=["zeros", "equal", "ascending", "descending", "ties", "denormal", "huge", "huge negative", "signed zeros", "inf"])
def test_values(logits):
    """Ties go to the lowest numbers; signed zeros are equal; -inf of a visible entry is a value."""
    assert_same(logits, [3000, 2999], 512)


@pytest.mark.parametrize("visible", [0, 1, 255, 256, 257, 300, 511, 512, 2000, 4000])
def test_levels(visible, monkeypatch):
    """Rows of many chunks, short ones among them: here of 256, kept 40 of each, until one chunk is left."""
    monkeypatch.setattr(kernels, "_CHUNK", 256)
    monkeypatch.setattr(kernels, "_LEAST_BLOCK", 64)
    assert_same(normal(2, 4000), [visible, 4000], 40)
    assert_same((normal(2, 4000) * 2).round(), [visible, 4000], 40)


def test_longest_context():
    """262144 entries are a context of 1 M tokens; one row has few, as in a captured graph."""
    assert_same(normal(2, 262144).mul_(8).round_(), [262144, 700], 1024)


def test_nothing_and_no_rows():
    run = topk_select.implementations["triton"].load()
    assert run(torch.empty(0, 100), torch.empty(0, dtype=torch.int64), 10).shape == (0, 10)
    assert run(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64), 10).shape == (2, 0)


def test_reads_only_its_columns():
    wide = normal(3, 900)
    assert_same(wide[:, 100:800], [700, 20, 500], 64)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_floats(data):
    rows, entries = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 200))
    floats = st.floats(width=32, allow_nan=False)
    logits = torch.tensor([data.draw(st.lists(floats, min_size=entries, max_size=entries)) for _ in range(rows)])
    visible = [data.draw(st.integers(0, entries)) for _ in range(rows)]
    assert_same(logits, visible, data.draw(st.integers(1, 220)))
