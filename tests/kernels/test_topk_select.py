"""topk_select in Triton against its reference: the same numbers exactly, whatever the values."""

from __future__ import annotations

import pytest
import torch
from batches import Tables
from devices import kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_plugin.kernels.triton import topk_select as kernels
from dsv4_plugin.ops import build_step_plan, topk_select


def assert_same(logits: torch.Tensor, visible: list[int], topk: int) -> None:
    """Logits that a row does not see are poisoned with inf, the largest there is."""
    seen = torch.tensor(visible, dtype=torch.int64)
    poisoned = logits.masked_fill(torch.arange(logits.shape[1]) >= seen.unsqueeze(-1), float("inf"))
    got = kernel(topk_select)(poisoned, seen, topk)
    assert torch.equal(got, topk_select.reference(logits, seen, topk))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entries", [1, 16, 17, 777, 1025, 16384])
def test_one_chunk(entries):
    assert_same(normal(3, entries), [entries, entries // 2, 0], 16)


@pytest.mark.parametrize("topk", [512, 1024])
def test_released_sizes(topk):
    assert_same(normal(3, 2500), [2500, topk + 1, topk], topk)


VALUES = {
    "zeros": torch.zeros(2, 3000),
    "equal": torch.full((2, 3000), -1e30),
    "ascending": torch.arange(6000.0).view(2, 3000),
    "descending": -torch.arange(6000.0).view(2, 3000),
    "ties": normal(2, 3000).round(),
    "denormal": normal(2, 3000) * 1e-40,
    "huge": normal(2, 3000).mul(40).exp(),
    "huge negative": -normal(2, 3000).mul(40).exp(),
    "of either sign": torch.where(normal(2, 3000) > 0, 1e4, -1e4),
    "signed zeros": torch.where(normal(2, 3000) > 0, 0.0, -0.0),
    "signed zeros between denormals": torch.tensor([1e-45, 0.0, -0.0, -1e-45]).repeat(2, 750),
    "inf": normal(2, 3000).masked_fill(normal(2, 3000, seed=1) > -1, float("-inf")),
}


@pytest.mark.parametrize("logits", VALUES.values(), ids=VALUES)
def test_values(logits):
    """Ties go to the lowest numbers; signed zeros are equal; -inf of a visible entry is a value."""
    assert_same(logits, [3000, 2999], 1200)


@pytest.mark.parametrize("logits", VALUES.values(), ids=VALUES)
def test_values_of_many_chunks(logits, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 512)
    monkeypatch.setattr(kernels, "_LEAST_BLOCK", 64)
    assert_same(logits, [3000, 513], 100)


def test_nan_is_past_infinity():
    """By its sign, above or below every value; all bits set, the lowest of all, is not taken for
    what no row sees."""
    logits = normal(2, 400)
    highest, lowest = logits > 1, logits < -1
    nan = torch.where(highest, 0x7FC00000, -1).to(torch.int32).view(torch.float32)
    seen = torch.tensor([400, 90])
    for topk in (20, 300, 390):
        got = kernel(topk_select)(torch.where(highest | lowest, nan, logits), seen, topk)
        want = logits.masked_fill(highest, float("inf")).masked_fill(lowest, float("-inf"))
        assert torch.equal(got, topk_select.reference(want, seen, topk))


@pytest.mark.parametrize("visible", [0, 1, 255, 256, 257, 300, 511, 512, 2000, 4000])
def test_levels(visible, monkeypatch):
    """Rows of many chunks, short ones among them: here of 256, kept 40 of each, until one chunk is
    left."""
    monkeypatch.setattr(kernels, "_CHUNK", 256)
    monkeypatch.setattr(kernels, "_LEAST_BLOCK", 64)
    assert_same(normal(2, 4000), [visible, 4000], 40)
    assert_same((normal(2, 4000) * 2).round(), [visible, 4000], 40)


@pytest.mark.parametrize("entries", [16385, 33000])
def test_released_chunks(entries):
    """Rows of a chunk, one entry more and one less; the border lies among equals of two chunks."""
    assert_same(normal(3, entries).mul_(2).round_(), [entries, 16384, 16383], 512)


def test_border_across_chunks():
    """The equals that are kept end just before, at and just after the first entry of the second
    chunk."""
    logits = torch.full((3, 16900), -1.0)
    for row, first in enumerate((15872, 15873, 15874)):
        logits[row, first:] = 0.0
    assert_same(logits, [16900] * 3, 512)


def test_longest_context():
    """262144 entries are a context of 1 M tokens; one row has few, as in a captured graph."""
    assert_same(normal(2, 262144).mul_(8).round_(), [262144, 700], 1024)


def test_nothing_and_no_rows():
    run = kernel(topk_select)
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
    logits = torch.tensor(
        [data.draw(st.lists(floats, min_size=entries, max_size=entries)) for _ in range(rows)]
    )
    visible = [data.draw(st.integers(0, entries)) for _ in range(rows)]
    assert_same(logits, visible, data.draw(st.integers(1, 220)))


@pytest.mark.parametrize("chunk", [16384, 512])
def test_slots_of_a_plan(chunk, monkeypatch):
    """Rows of two requests on shuffled pages: the reference's numbers through its page table."""
    monkeypatch.setattr(kernels, "_CHUNK", chunk)
    prefix, counts = [2000, 3], [3, 2]
    plan = build_step_plan.reference(**Tables(2, 2100).arguments(prefix, counts))
    logits, seen = normal(5, plan.max_seq_len // 4), plan.visible(4)
    got = kernel(topk_select)(logits, seen, 64, plan)
    assert torch.equal(got, topk_select.reference(logits, seen, 64, plan))
    numbers = topk_select.reference(logits, seen, 64)
    for row, request in enumerate(plan.request.tolist()):
        pages = plan.page_table[request].tolist()
        want = [pages[n // 64] * 64 + n % 64 if n >= 0 else -1 for n in numbers[row].tolist()]
        assert got[row].tolist() == want
