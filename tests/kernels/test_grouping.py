"""Grouping of (token, choice) pairs by expert, in Triton and in plain torch, against a loop."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.kernels import grouping
from dsv4_plugin.kernels.triton.grouping import group_by_expert

TOPK = 6


def choices(tokens: int, experts: int, kind: str) -> torch.Tensor:
    """int64 [tokens, TOPK] as routing gives them."""
    if kind == "uniform":
        return torch.rand(tokens, experts).argsort(-1)[:, :TOPK].contiguous()
    if kind == "one expert takes all":
        return torch.full((tokens, TOPK), experts - 1)
    if kind == "six of all":
        return (torch.arange(TOPK) * (experts // TOPK) + 1).expand(tokens, -1).contiguous()
    if kind == "skewed":
        return (torch.rand(tokens, TOPK) ** 4 * experts).long()
    assert kind == "nobody"
    return torch.full((tokens, TOPK), -1)


def blocks(groups: grouping.Groups) -> list[tuple[int, list[int]]]:
    """(expert, pairs) of every block, padding checked and taken off."""
    found = []
    for expert, pairs in zip(groups.experts.tolist(), groups.pairs.tolist()):
        if expert >= 0:
            real = [pair for pair in pairs if pair >= 0]
            assert pairs == real + [-1] * (len(pairs) - len(real))
            found.append((expert, real))
    return sorted(found)


def loop(chosen: torch.Tensor, first: int, experts: int, block: int) -> list[tuple[int, list[int]]]:
    mine: dict[int, list[int]] = {}
    for pair, expert in enumerate(chosen.flatten().tolist()):
        if first <= expert < first + experts:
            mine.setdefault(expert - first, []).append(pair)
    return sorted(
        (expert, pairs[start : start + block])
        for expert, pairs in mine.items()
        for start in range(0, len(pairs), block)
    )


@pytest.mark.parametrize(
    "kind", ["uniform", "one expert takes all", "six of all", "skewed", "nobody"]
)
@pytest.mark.parametrize(
    "tokens, held, block", [(1, 24, 16), (5, 24, 16), (67, 24, 16), (203, 8, 64), (900, 12, 128)]
)
def test_every_pair_is_in_one_block_of_its_expert(tokens, held, block, kind):
    """`held` experts of 24 are here, from the last third on where not all are."""
    chosen, first = choices(tokens, 24, kind), 24 - held
    want = loop(chosen, first, held, block)
    counts = torch.zeros(held, dtype=torch.int32)
    for expert, pairs in want:
        counts[expert] += len(pairs)
    size = grouping.slots(chosen.numel(), held, block)
    for groups in (
        group_by_expert(chosen, first, held, block),
        grouping.group_by_expert(chosen, first, held, block),
    ):
        assert groups.pairs.shape == (size, block) and groups.experts.shape == (size,)
        assert blocks(groups) == want
        assert torch.equal(groups.counts, counts)


@pytest.mark.parametrize("tokens", [3, 300])
def test_384_experts_of_which_six_are_touched(tokens):
    chosen = choices(tokens, 384, "six of all")
    groups = group_by_expert(chosen, 0, 384, 16)
    want = grouping.group_by_expert(chosen, 0, 384, 16)
    assert torch.equal(groups.experts, want.experts) and torch.equal(groups.counts, want.counts)
    used = want.experts >= 0
    assert torch.equal(groups.pairs[used], want.pairs[used])
    assert int(used.sum()) == 6 * -(-tokens // 16)


def test_no_tokens():
    for group in (group_by_expert, grouping.group_by_expert):
        groups = group(torch.empty(0, TOPK, dtype=torch.int64), 0, 8, 16)
        assert groups.pairs.shape == (0, 16) and groups.experts.numel() == 0
        assert not groups.counts.any()


def test_more_pairs_than_one_chunk():
    chosen = choices(1500, 16, "skewed")
    got, want = (group(chosen, 0, 16, 64) for group in (group_by_expert, grouping.group_by_expert))
    used = want.experts >= 0
    assert torch.equal(got.experts, want.experts)
    assert torch.equal(got.pairs[used], want.pairs[used])


@pytest.mark.parametrize("experts", [8, 48, 384])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_there_are_slots_for_every_block(experts, block):
    """The most blocks that any choice gives, at every number of pairs."""
    for pairs in range(0, 4000, 7):
        worst = min(pairs, (pairs + min(experts, pairs) * (block - 1)) // block)
        assert grouping.slots(pairs, experts, block) >= worst
