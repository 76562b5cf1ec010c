"""How rows are handed to experts: blocks of (token, choice) pairs of one expert each, in arrays of
sizes that follow from shapes alone.

A pair has the number token · topk + choice. A block has a slot that follows from the choices
without a prefix sum over blocks, so that one launch finds all of them, each expert by itself:

* few pairs (at most as many as there would be slots): the slot is the number of the block's first
  pair. Most slots are in use, whatever the number of experts.
* many pairs: before the blocks of expert e lie (pairs of lower experts) // block + e slots, which
  is never less than their blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Pairs by expert. Blocks of one expert are in the order of its pairs."""

    pairs: Tensor
    """int32 [slots, block]: number of the pair in each row of a block, -1 where it has none;
    undefined in a slot without a block."""
    experts: Tensor
    """int32 [slots]: expert of the block among those held here, -1 for a slot without a block."""
    counts: Tensor
    """int32 [E]: pairs of each expert."""


def by_leader(pairs: int, experts: int, block: int) -> bool:
    """Whether slots are numbers of pairs."""
    return pairs <= experts + pairs // block


def slots(pairs: int, experts: int, block: int) -> int:
    """Slots of `pairs` over `experts` in blocks of `block`."""
    return min(pairs, experts + pairs // block)


def group_by_expert(chosen: Tensor, first: int, experts: int, block: int) -> Groups:
    """Groups of `chosen` int64 [T, topk] over experts `first` .. `first` + `experts` - 1; pairs of
    others, and of -1, are in no block. Plain torch: the definition."""
    number = chosen.numel()
    local = chosen.flatten() - first
    local = local.masked_fill((local < 0) | (local >= experts), experts)
    order = local.argsort(stable=True)
    counts = local.bincount(minlength=experts + 1)[:experts]
    before = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    sorted_local = local[order]
    place = torch.arange(number, device=chosen.device)
    rank = place - before[sorted_local]
    if by_leader(number, experts, block):
        slot = order[place - rank % block]
    else:
        slot = before[sorted_local] // block + sorted_local + rank // block
    held = sorted_local < experts
    size = slots(number, experts, block)
    pairs = chosen.new_full((size, block), -1, dtype=torch.int32)
    owners = chosen.new_full((size,), -1, dtype=torch.int32)
    pairs[slot[held], rank[held] % block] = order[held].to(torch.int32)
    owners[slot[held]] = sorted_local[held].to(torch.int32)
    return Groups(pairs, owners, counts.to(torch.int32))
