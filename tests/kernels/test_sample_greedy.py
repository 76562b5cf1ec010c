"""sample_greedy in Triton against its reference: the same ids, whatever the values."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.kernels.triton import sample_greedy as kernels
from dsv4_plugin.ops import sample_greedy
from dsv4_plugin.parallel import Group

NAN, INF = float("nan"), float("inf")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


VALUES = {
    "normal": normal(3, 700),
    "ties": normal(3, 700).round(),
    "negative": -normal(3, 700).abs() - 1,
    "equal": torch.full((3, 700), -7.5),
    "signed zeros": torch.where(normal(3, 700) > 0, 0.0, -0.0),
    "denormal": normal(3, 700) * 1e-40,
    "huge": normal(3, 700) * 1e38,
    "-inf": torch.full((3, 700), -INF),
    "some -inf": normal(3, 700).masked_fill(normal(3, 700) > -1, -INF),
    "inf": normal(3, 700).masked_fill(normal(3, 700) > 2, INF),
    "NaN": torch.full((3, 700), NAN),
    "some NaN of either sign": torch.where(normal(3, 700) > 0, torch.tensor(NAN), normal(3, 700)),
    "negative NaN": torch.where(
        normal(3, 700) > 1,
        torch.tensor(-1, dtype=torch.int32).view(torch.float32),
        normal(3, 700),
    ),
    "bf16": normal(3, 700).bfloat16(),
}


@pytest.mark.parametrize("stretch", [8192, 64])
@pytest.mark.parametrize("logits", VALUES.values(), ids=VALUES)
def test_values(logits, stretch, monkeypatch):
    monkeypatch.setattr(kernels, "_STRETCH", stretch)
    got = kernels.sample_greedy(logits)
    assert got.dtype == torch.int64
    assert torch.equal(got, sample_greedy.reference(logits))


@pytest.mark.parametrize("stretch", [8192, 64])
@pytest.mark.parametrize("logits", VALUES.values(), ids=VALUES)
def test_shares_of_the_vocabulary(logits, stretch, monkeypatch):
    """What five ranks choose together is what one chooses from all."""
    monkeypatch.setattr(kernels, "_STRETCH", stretch)
    given: dict[int, torch.Tensor] = {}

    def choose(rank: int) -> torch.Tensor:
        def all_gather(best: torch.Tensor) -> torch.Tensor:
            given[rank] = best
            return torch.stack([given.get(each, best) for each in range(5)])

        group = Group(rank, 5, all_gather=all_gather)
        return kernels.sample_greedy(logits[:, group.slice(700)], group)

    for rank in range(5):  # each learns what the others give only when all have given
        choose(rank)
    want = sample_greedy.reference(logits)
    assert all(torch.equal(choose(rank), want) for rank in range(5))


def test_largest_id_of_a_released_vocabulary():
    logits = torch.zeros(2, 129280)
    logits[0, -1], logits[1, 8192] = 1e-30, 5.0
    assert kernels.sample_greedy(logits).tolist() == [129279, 8192]


def test_no_rows_and_wide_rows():
    assert kernels.sample_greedy(torch.empty(0, 300)).shape == (0,)
    wide = normal(4, 900)
    want = sample_greedy.reference(wide[:, 100:800])
    assert torch.equal(kernels.sample_greedy(wide[:, 100:800]), want)
