"""Ranks choose alike, by processes that talk through gloo: near ties of experts and entries, and
noise in the last bit of one rank's activations."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.model import agreement
from dsv4_plugin.model.agreement import Agreement, watched
from dsv4_plugin.parallel import Group
from dsv4_plugin.runtime.ranks import Run, try_ranks

QUIET, NOISY, ALONE = Run("first"), Run("first", noisy=True), Run("each", noisy=True)


@pytest.mark.parametrize(("size", "layout"), [(2, "tensor"), (4, "expert")])
def test_noise_on_one_rank_changes_no_rank_s_choice_alone(size, layout):
    quiet, noisy, alone = try_ranks(
        size, layout, torch.device("cpu"), seed=1, runs=(QUIET, NOISY, ALONE)
    )
    for outcomes in (quiet, noisy, alone):
        assert len(outcomes) == size
        # Of three chunks: experts of 3 layers, entries of 2 layers.
        assert {outcome.compared for outcome in outcomes} == {3 * (3 + 2)}
    assert {(each.differing, each.uneven) for each in quiet} == {(0, 0)}
    # The noise would turn choices, on its rank alone; rank 0's are everybody's.
    assert all(each.differing > 10 and each.uneven == 0 for each in noisy)
    assert all(torch.equal(each.logits, noisy[0].logits) for each in noisy)
    assert all(each.uneven > 0 for each in alone), "the test must see what the switch prevents"


def playing(rank: int, zero: torch.Tensor, size: int = 2) -> Group:
    """A group in which rank 0 sends `zero` packed, and all ranks hold what this one does."""
    return Group(rank, size, lambda x: x * size, lambda packed: zero if rank else packed)


@pytest.fixture
def first(monkeypatch):
    monkeypatch.setenv("DSV4_CHOICES", "first")


def test_rank_zero_s_numbers_and_weights_arrive_bit_for_bit(first):
    chosen = torch.tensor([[3, 1], [262143, -1]])
    weights = torch.tensor([[0.25, 1e-45], [float("inf"), -0.0]])
    packed = torch.cat((chosen.int(), weights.view(torch.int32)), -1)
    agree = Agreement("experts", playing(1, packed))
    numbers, got = agree(torch.zeros_like(chosen), torch.zeros_like(weights))
    assert torch.equal(numbers, chosen) and numbers.dtype == torch.int64
    assert torch.equal(got.view(torch.int32), weights.view(torch.int32))


def test_one_rank_no_rows_and_everybody_for_himself_send_nothing(first, monkeypatch):
    def never(x):
        raise AssertionError("nothing is to be sent")

    chosen = torch.tensor([[1, 2]])
    assert Agreement("entries", Group())(chosen)[0] is chosen
    silent = Group(1, 2, never, never)
    assert Agreement("entries", silent)(chosen[:0])[0].shape == (0, 2)
    monkeypatch.setenv("DSV4_CHOICES", "each")
    assert Agreement("entries", silent)(chosen)[0] is chosen


def test_the_order_of_a_choice_is_no_difference(first):
    zero = torch.tensor([[2, 1]], dtype=torch.int32)
    with watched() as seen:
        Agreement("experts", playing(1, zero))(torch.tensor([[1, 2]]))
    assert seen.compared == 1 and not seen.differing and not seen.uneven
    with watched() as seen:
        Agreement("experts", playing(1, zero))(torch.tensor([[1, 3]]))
    assert seen.differing and not seen.uneven
    assert not agreement._WATCHES


def test_a_broadcast_that_sends_nothing_is_found(first):
    """Every rank keeps its own numbers: their sum is not that of equal ones."""
    own = torch.tensor([[1, 3]])
    broken = Group(1, 2, lambda x: x + torch.arange(x.shape[-1]) if x.dim() > 1 else x)
    with watched() as seen:
        Agreement("experts", broken)(own)
    assert seen.uneven
