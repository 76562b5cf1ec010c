"""Greedy choice, ties included."""

from __future__ import annotations

import threading

import torch

from dsv4_plugin.ops import sample_greedy
from dsv4_plugin.parallel import Group


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


def on_two_ranks(logits: torch.Tensor) -> list[torch.Tensor]:
    """What each of two ranks, threads here, chooses from its share of the vocabulary."""
    barrier, parts, found = threading.Barrier(2, timeout=60), [None, None], [None, None]

    def choose(rank: int) -> None:
        def all_gather(x: torch.Tensor) -> torch.Tensor:
            parts[rank] = x
            barrier.wait()
            together = torch.stack(parts)
            barrier.wait()
            return together

        group = Group(rank, 2, all_gather=all_gather)
        found[rank] = sample_greedy.reference(logits[:, group.slice(logits.shape[1])], group)

    threads = [threading.Thread(target=choose, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_two_ranks_choose_as_one():
    """Ties within a share and across both, NaN, infinities, rows of nothing."""
    nan, inf = float("nan"), float("inf")
    logits = torch.randint(0, 4, (40, 300), generator=torch.Generator().manual_seed(1)).float()
    logits[:8] = torch.randn(8, 300, generator=torch.Generator().manual_seed(2))
    logits[8:14, 100:200] = nan
    logits[14], logits[15], logits[16] = nan, -inf, 1.0
    logits[17, :150], logits[18, 150:] = nan, inf
    got = on_two_ranks(logits)
    want = sample_greedy.reference(logits)
    assert [each.tolist() for each in got] == [want.tolist()] * 2
    assert {int(token) // 150 for token in want} == {0, 1}, "either share has some of the best"
