"""Greedy choice, ties included."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dsv4_plugin.ops import sample_greedy
from dsv4_plugin.parallel import Group
from dsv4_plugin.runtime import ranks


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


def shares(rank: int, size: int, port_file: str, logits: torch.Tensor) -> torch.Tensor:
    """What one of two processes chooses from its share of the vocabulary."""
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=size)
    try:
        group = Group(rank, size, all_gather=ranks._all_gather)
        return sample_greedy.reference(logits[:, group.slice(logits.shape[1])], group)
    finally:
        dist.destroy_process_group()


def test_two_processes_choose_as_one(tmp_path):
    """Ties within a share and across both, NaN, infinities, rows of nothing."""
    nan, inf = float("nan"), float("inf")
    logits = torch.randint(0, 4, (40, 300), generator=torch.Generator().manual_seed(1)).float()
    logits[:8] = torch.randn(8, 300, generator=torch.Generator().manual_seed(2))
    logits[8:14, 100:200] = nan
    logits[14], logits[15], logits[16] = nan, -inf, 1.0
    logits[17, :150], logits[18, 150:] = nan, inf
    got = ranks._on_ranks(2, shares, (str(tmp_path / "meeting"), logits))
    want = sample_greedy.reference(logits)
    assert [each.tolist() for each in got] == [want.tolist()] * 2
    assert {int(token) // 150 for token in want} == {0, 1}, "either share has some of the best"
