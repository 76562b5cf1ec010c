"""Pairs of tokens and experts in blocks by expert, in one launch (kernels/grouping.py).

Variants: experts held; of few pairs rows of a block, and above 512 of them a power of two.

A program an expert reads all choices, once or twice. Nothing is counted with atomics and nothing
comes back to the CPU. Bytes: 8·P for every expert, from cache; 4·P written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouping import Groups, by_leader, slots
from ..strides import require_contiguous

_CHUNK = 4096
_MOST_ROWS = 128
"""Of a block of many pairs."""
_LEAST_CHUNK = 512
"""Of few pairs: eight to a lane of the one wave that has them, so that nothing crosses waves."""


@triton.jit
def _local(chosen, at, pairs, first, EXPERTS: tl.constexpr):
    """Expert of each pair `at` among those held here; EXPERTS if another process holds it or nobody
    does, one more past the end."""
    local = tl.load(chosen + at, mask=at < pairs, other=0).to(tl.int32) - first
    local = tl.where((local < 0) | (local >= EXPERTS), EXPERTS, local)
    return tl.where(at < pairs, local, EXPERTS + 1)


@triton.jit
def _place_by_leader(chosen, grouped, owners, pairs, first, own, EXPERTS, BLOCK, CHUNK):
    """Blocks of expert `own` in the slots of their first pairs; returns how many pairs it has."""
    at, lane = tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    mine = _local(chosen, at, pairs, first, EXPERTS) == own
    rank = tl.cumsum(mine.to(tl.int32), 0) - 1
    leads = (rank % BLOCK == 0) & (own < EXPERTS)
    tl.store(owners + at, tl.where(leads, own, -1), mask=mine)
    count = tl.sum(mine.to(tl.int32), 0)
    if own < EXPERTS:
        for begin in range(0, count, BLOCK):
            leader = tl.min(tl.where(mine & (rank == begin), at, CHUNK), 0)
            here = mine & (rank // BLOCK == begin // BLOCK)
            tl.store(grouped + leader * BLOCK + rank % BLOCK, at, mask=here)
            empty = lane >= count - begin
            tl.store(grouped + leader * BLOCK + lane, lane * 0 - 1, mask=empty)
    return count


@triton.jit
def _place_in_order(chosen, grouped, owners, pairs, slots, first, block, own, EXPERTS, MOST, CHUNK):
    """Blocks of expert `own`, of `block` rows and at most MOST, behind those of lower experts;
    returns how many pairs it has."""
    place, lane = tl.arange(0, CHUNK), tl.arange(0, MOST)
    before, count = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for start in range(0, pairs, CHUNK):
        local = _local(chosen, start + place, pairs, first, EXPERTS)
        before += tl.sum((local < own).to(tl.int32), 0)
        count += tl.sum((local == own).to(tl.int32), 0)
    slot, blocks = before // block + own, tl.cdiv(count, block)
    behind = (before + count) // block + own + 1
    if own == EXPERTS:
        blocks, behind = 0, slots
    for begin in range(slot, behind, MOST):
        owner = tl.where(begin + lane < slot + blocks, own, -1)
        tl.store(owners + begin + lane, owner, mask=begin + lane < behind)
    done = tl.zeros((), tl.int32)
    if blocks > 0:
        for start in range(0, pairs, CHUNK):
            mine = _local(chosen, start + place, pairs, first, EXPERTS) == own
            row = done + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(grouped + slot * block + row, start + place, mask=mine)
            done += tl.sum(mine.to(tl.int32), 0)
        last = (blocks - 1) * block + lane
        empty = (last >= count) & (lane < block)
        tl.store(grouped + slot * block + last, lane * 0 - 1, mask=empty)
    return count


@triton.jit(do_not_specialize=("pairs", "slots", "first", "block"))
def group_kernel(
    chosen,
    grouped,
    owners,
    counts,
    pairs,
    slots,
    first,
    block,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_LEADER: tl.constexpr,
):
    """Grid (E + 1): the blocks of an expert, of `block` rows; the last program takes what is
    nobody's here. BLOCK is `block` if BY_LEADER, else the most that it may be."""
    own = tl.program_id(0)
    if BY_LEADER:
        count = _place_by_leader(chosen, grouped, owners, pairs, first, own, EXPERTS, BLOCK, CHUNK)
    else:
        count = _place_in_order(
            chosen, grouped, owners, pairs, slots, first, block, own, EXPERTS, BLOCK, CHUNK
        )
    tl.store(counts + own, count, mask=own < EXPERTS)


def group_by_expert(chosen: Tensor, first: int, experts: int, block: int) -> Groups:
    """The same as kernels.grouping.group_by_expert, on the device alone."""
    require_contiguous("group_by_expert", chosen=chosen)
    number = chosen.numel()
    size = slots(number, experts, block)
    numbers = {"dtype": torch.int32, "device": chosen.device}
    groups = Groups(
        torch.empty(size, block, **numbers),
        torch.empty(size, **numbers),
        torch.empty(experts, **numbers),
    )
    leading = by_leader(number, experts, block)
    chunk = max(_LEAST_CHUNK, triton.next_power_of_2(number)) if leading else _CHUNK
    group_kernel[(experts + 1,)](
        chosen,
        groups.pairs,
        groups.experts,
        groups.counts,
        number,
        size,
        first,
        block,
        EXPERTS=experts,
        BLOCK=block if leading else _MOST_ROWS,
        CHUNK=chunk,
        BY_LEADER=leading,
        num_warps=min(8, chunk // _LEAST_CHUNK) if leading else 8,
    )
    return groups
