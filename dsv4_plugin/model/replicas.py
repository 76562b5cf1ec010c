"""Rows of a step in all replicas of the attention: what their experts work on together
(docs/parallelism.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parallel import Group, Parallel, Replicas


class ReplicaError(RuntimeError):
    """A replica with more rows than all others were told."""


def rows_of_all(parallel: Parallel, own: int) -> RowsOfAll | None:
    """The rows of a step of which this replica has `own`; None where there are no replicas."""
    if parallel.replicas is None:
        return None
    return RowsOfAll(parallel.replicas, parallel.attention, own)


class RowsOfAll:
    """The rows of one step: gathered from all replicas, and summed back to their own.

    Where all replicas have equally many, each process sends and receives its share of them
    (all-gather, reduce-scatter), as it always is in a captured step. Otherwise every process fills
    its own part of all rows and the parts are added (all-reduce): twice the traffic, but no row of
    padding for the experts to work on. `attention` is the group of the processes of one replica,
    which hold the same rows.
    """

    def __init__(self, replicas: Replicas, attention: Group, own: int):
        rows = replicas.rows(own)
        self.prefills = rows.prefills
        self._everybody, self._attention, self._own = replicas.everybody, attention, own
        self._counts, self._told = rows.counts, rows.counts[replicas.rank]
        if own > self._told:
            raise ReplicaError(
                f"replica {replicas.rank} has {own} rows and told the others {self._told}"
            )
        start = sum(rows.counts[: replicas.rank])
        self._here = slice(start, start + own)
        self._even = len(set(rows.counts)) == 1 and self._told % attention.size == 0

    def gather(self, x: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, ...]:
        """Activations [N, d], weights fp32 [N, k] and experts int64 [N, k] of all rows, of those
        of this replica: [T, d], fp32 [T, k], int64 [T, k]. A replica's choice is everybody's.

        One message of bits. Rows that nobody has carry zeros, so an expert is sent as its number
        + 1 and nobody's, -1, as 0.
        """
        packed = (x.view(torch.int32), weights.view(torch.int32), (experts + 1).to(torch.int32))
        widths = [part.shape[1] for part in packed]
        all_rows = self._gathered(torch.cat(packed, -1))
        values, all_weights, all_experts = all_rows.split(widths, -1)
        return (
            values.contiguous().view(x.dtype),
            all_weights.contiguous().view(torch.float32),
            all_experts.to(torch.int64) - 1,
        )

    def _gathered(self, own: Tensor) -> Tensor:
        """int32 [N, w] of `own` int32 [T, w]; integers, whose sum with zeros is every bit."""
        if self._even:
            if own.shape[0] < self._told:
                own = torch.cat((own, own.new_zeros(self._told - own.shape[0], own.shape[1])))
            return self._everybody.all_gather(own[self._attention.slice(self._told)]).flatten(0, 1)
        everything = own.new_zeros(sum(self._counts), own.shape[1])
        if self._attention.rank == 0:
            everything[self._here] = own
        return self._everybody.all_reduce(everything)

    def scatter(self, shares: Tensor, own: Tensor) -> Tensor:
        """fp32 [T, d]: the sum over all processes of `shares` fp32 [N, d] in the rows of this
        replica, plus the sum over its processes of `own` fp32 [T, d]. Changes `shares`."""
        shares[self._here] += own  # added before it is sent: one sum for both
        if not self._even:
            return self._everybody.all_reduce(shares)[self._here]
        part = self._everybody.reduce_scatter(shares)
        return self._attention.all_gather(part).flatten(0, 1)[: self._own]
