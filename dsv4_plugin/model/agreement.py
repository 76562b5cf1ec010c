"""What all ranks must choose alike: the experts of a token, and the entries it attends to
(docs/precision.md, "Ranks choose alike").

Every rank computes both, from activations that are the same bits only where its arithmetic is. A
rank that chose otherwise would add its slice of another expert, or attend elsewhere. So rank 0's
choice is everybody's.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import flags
from ..ops.operator import HERE
from ..parallel import Group


@dataclass
class Seen:
    """What a watch found, the same on every rank."""

    compared: int = 0
    """Choices that were compared."""
    differing: Counter = field(default_factory=Counter)
    """Rows whose own choice is not rank 0's, on any rank, by what is chosen and the layer."""
    uneven: set = field(default_factory=set)
    """What is chosen, and in which layer, where the choices that the ranks go on with differ."""

    def __str__(self) -> str:
        return ", ".join(
            f"{rows} rows of {what} in layer {layer}"
            for (what, layer), rows in sorted(self.differing.items())
        )


_WATCHES: list[Seen] = []


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    """While it lasts, every choice of several ranks is compared; every rank must be in it, and each
    comparison waits for all."""
    seen = Seen()
    _WATCHES.append(seen)
    try:
        yield seen
    finally:
        _WATCHES.remove(seen)


class Agreement:
    """The choice of `what` in the ranks of `groups`: rank 0's, or with DSV4_CHOICES=each
    everybody's own."""

    def __init__(self, what: str, *groups: Group):
        self.what = what
        self.groups = [group for group in groups if group.size > 1]
        self.one_decides = flags.read("DSV4_CHOICES") == "first"

    def __call__(self, chosen: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """`chosen` int64 [T, k] and what belongs to it, fp32 [T, k] each, of the rank that
        decides. The numbers of `chosen` are below 2^31."""
        own = (chosen, *others)
        if not self.groups or not chosen.numel() or not (self.one_decides or _WATCHES):
            return own
        taken = self._of_rank_zero(own)
        used = taken if self.one_decides else own
        for seen in _WATCHES:
            self._compare(seen, chosen, taken[0], used[0])
        return used

    def _of_rank_zero(self, own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One message a group: 4 bytes a number."""
        packed = torch.cat((own[0].to(torch.int32), *(x.view(torch.int32) for x in own[1:])), -1)
        for group in self.groups:
            packed = group.broadcast(packed)
        numbers, *others = packed.split([x.shape[-1] for x in own], -1)
        return numbers.to(torch.int64), *(x.contiguous().view(torch.float32) for x in others)

    def _compare(self, seen: Seen, chosen: Tensor, first: Tensor, used: Tensor) -> None:
        """Sets, not orders: experts are added, entries attended to, in any order."""
        own, first, used = (x.sort(-1).values for x in (chosen, first, used))
        differing = self._summed((own != first).any(-1).sum().view(1))
        size = math.prod(group.size for group in self.groups)
        seen.compared += 1
        if int(differing):
            seen.differing[self.what, HERE.layer] += int(differing)
        # By halves of 16 bits: sums over ranks are exact in fp32.
        halves = torch.cat((used & 0xFFFF, used >> 16), -1)
        if not torch.equal(self._summed(halves), halves.float() * size):
            seen.uneven.add((self.what, HERE.layer))

    def _summed(self, x: Tensor) -> Tensor:
        total = x.to(torch.float32)
        for group in self.groups:
            total = group.all_reduce(total.clone())
        return total
