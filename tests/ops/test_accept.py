"""Which drafts stay: greedy against decoding by hand, sampled in law."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from dsv4_plugin.ops.accept import accept_greedy, accept_sampled, probabilities

VOCAB, WIDTH, TRIALS = 12, 3, 60_000


def law(*shape: int, seed: int) -> torch.Tensor:
    """Probabilities [..., VOCAB], uneven, some of them 0."""
    logits = torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5
    return logits.masked_fill(logits < -2, float("-inf")).softmax(-1)


def test_greedy_stops_at_the_first_difference():
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(200, WIDTH + 1, 4, generator=chance)
    drafted = torch.randint(0, 4, (200, WIDTH), generator=chance)
    got = accept_greedy(drafted, logits)
    for row in range(200):
        best = logits[row].argmax(-1).tolist()
        count = 0
        while count < WIDTH and drafted[row, count] == best[count]:
            count += 1
        assert (got.count[row], got.bonus[row]) == (count, best[count])
    assert set(got.count.tolist()) == {0, 1, 2, 3}


def test_ties_are_decided_as_by_greedy_decoding():
    logits = torch.zeros(1, 2, 5)
    assert accept_greedy(torch.tensor([[0]]), logits).count.tolist() == [1]
    assert accept_greedy(torch.tensor([[1]]), logits).count.tolist() == [0]


@pytest.mark.parametrize(
    "target, drawn",
    [(law(WIDTH + 1, seed=1), law(WIDTH, seed=2)), (law(WIDTH + 1, seed=3), None)],
    ids=["another law", "one-hot drafts"],
)
def test_sampled_tokens_follow_the_target(target, drawn):
    """Here the target's law of a token does not depend on those before it, so each must follow its
    own row alone."""
    chance = torch.Generator().manual_seed(7)
    if drawn is None:
        drafted = torch.tensor([5, 3, 1]).expand(TRIALS, -1)
        q = torch.nn.functional.one_hot(drafted, VOCAB).float()
    else:
        drafted = torch.stack(
            [torch.multinomial(row, TRIALS, True, generator=chance) for row in drawn], 1
        )
        q = drawn.expand(TRIALS, -1, -1)
    got = accept_sampled(drafted, q, target.expand(TRIALS, -1, -1), chance)
    first = torch.where(got.count >= 1, drafted[:, 0], got.bonus)
    check(first, target[0])
    reached = got.count >= 1
    second = torch.where(got.count >= 2, drafted[:, 1], got.bonus)
    check(second[reached], target[1])
    beyond = got.count == WIDTH
    check(got.bonus[beyond], target[WIDTH])
    # min(1, P/Q) summed over Q: how many of the first drafts stay
    rate = torch.minimum(target[0], q[0, 0]).sum() if drawn is not None else target[0, 5]
    assert abs(reached.float().mean() - rate) < 4 * (rate * (1 - rate) / TRIALS) ** 0.5


def check(tokens: torch.Tensor, wanted: torch.Tensor) -> None:
    found = torch.bincount(tokens, minlength=VOCAB).double()
    assert found[wanted == 0].sum() == 0
    often = wanted * len(tokens) >= 5
    expected = wanted[often].double()
    result = chisquare(found[often], expected / expected.sum() * found[often].sum())
    assert result.pvalue > 1e-3


def test_equal_laws_accept_all():
    p = law(500, WIDTH, seed=4)
    drafted = torch.multinomial(p.flatten(0, 1), 1).view(500, WIDTH)
    got = accept_sampled(drafted, p, torch.cat((p, law(500, 1, seed=5)), 1))
    assert got.count.tolist() == [WIDTH] * 500


def test_ones_and_zeros_make_it_greedy():
    chance = torch.Generator().manual_seed(1)
    logits = torch.randn(300, WIDTH + 1, 4, generator=chance)
    drafted = torch.randint(0, 4, (300, WIDTH), generator=chance)
    q = torch.nn.functional.one_hot(drafted, 4).float()
    got, want = (
        accept_sampled(drafted, q, probabilities(logits, 0.0)),
        accept_greedy(drafted, logits),
    )
    assert torch.equal(got.count, want.count) and torch.equal(got.bonus, want.bonus)


def test_probabilities():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    assert probabilities(logits, 0.0).tolist() == [[0, 1, 0, 0]]
    whole = probabilities(logits, 0.5)
    assert torch.allclose(whole, (logits * 2).softmax(-1))
    two = probabilities(logits, 0.5, top_k=2)
    assert two[0, [0, 3]].tolist() == [0, 0]
    assert torch.allclose(two.sum(), torch.ones(()))
    assert torch.allclose(two[0, 1] / two[0, 2], whole[0, 1] / whole[0, 2])
    # 0.868 alone does not reach 0.9, with the second it does.
    assert (probabilities(logits, 0.5, top_p=0.9) > 0).tolist() == [[False, True, True, False]]
    assert (probabilities(logits, 0.5, top_p=0.5) > 0).tolist() == [[False, True, False, False]]
