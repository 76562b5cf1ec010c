"""What one step reads and writes, as index tensors: built once per step and read by every layer
(docs/model.md §4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from .layout import entry_slots

WINDOW = 128
RING_ROWS = MappingProxyType({4: 8, 128: 128})
"""Rows of a compressor ring by ratio: per window page for 4, per request for 128."""

SPECULATION_RING_ROWS = MappingProxyType({4: 16, 128: 256})
"""The same where a step may be taken back: what it writes must not lie on what lies before it."""


def shrinkable_rows(ratio: int, ring: int) -> int:
    """The most rows of a request in a step that may be taken back but for the first: they and the
    items of the window that the first completes, which may all be needed, fit in the ring."""
    return ring - (ratio * (2 if ratio == 4 else 1) - 2)


@dataclass(frozen=True)
class Compression:
    """Windows of one compress ratio that this step completes, and the ring rows it leaves behind.

    N rows, one a completed window of W = ratio·halves items (ratio 4 overlaps the previous window:
    halves = 2). Rows past the completed windows pad N to a static number and are skipped: token,
    position, slot and all items -1.
    """

    ratio: int
    halves: int
    token: Tensor
    """int64 [N]: the step's row that completes the window."""
    position: Tensor
    """int64 [N]: first position of the window, where its entry is rotated."""
    slots: Tensor
    """int64 [N]: slot of the entry."""
    step_row: Tensor
    """int64 [N, W]: the step's row that holds the item, -1 if none."""
    ring_row: Tensor
    """int64 [N, W]: ring row that holds the item, -1 if none. An item that neither holds lies
    before position 0."""
    ring_write_row: Tensor
    """int64 [T]: ring row that keeps the projection of each of the step's rows, all different; -1
    if none does."""


@dataclass(frozen=True)
class StepPlan:
    """One step of R requests and T rows; the rows of a request are contiguous and its positions
    ascend by one."""

    position: Tensor
    """int64 [T]."""
    request: Tensor
    """int64 [T]: row of the batch, 0..R-1."""
    query: Tensor
    """int64 [T]: place of the row among its request's rows of this step."""
    max_queries: int
    """Most rows of one request."""
    max_seq_len: int
    """Longest sequence after the step."""
    window_write: Tensor
    """int64 [T]: window slot of the row's own latent."""
    window: Tensor
    """int64 [T, 128]: window slots the row attends to, -1 where there is none."""
    page_table: Tensor
    """int64 [R, ceil(max_seq_len/256)]: page of each 256 tokens; what lies past a sequence's end is
    undefined."""
    compression: dict[int, Compression]
    """By compress ratio."""
    dense_slots: Tensor | None = None
    """int64 [T, max_seq_len // 128]: slots of all ratio-128 entries the row sees, -1 past them;
    None where no ratio 128 is planned."""
    static: bool = False
    """Whether no shape depends on the values of the inputs, so that a graph may hold the step."""

    @property
    def phase(self) -> str:
        """ "decode" or "prefill"."""
        return phase(self.max_queries)

    def visible(self, ratio: int) -> Tensor:
        """int64 [T]: number of compressed entries the row sees, (position + 1) // ratio."""
        return (self.position + 1) // ratio

    def rows(self, rows: slice) -> StepPlan:
        """What the indexer reads of the plan, for these rows alone."""
        request, query = self.request[rows], self.query[rows]
        # rows of the request that is cut count from the first that is left
        query = query - torch.where(request == request[0], query[0], 0)
        return replace(
            self,
            position=self.position[rows],
            request=request,
            query=query,
            max_queries=min(self.max_queries, request.shape[0]),
            window_write=self.window_write[rows],
            window=self.window[rows],
            compression={},
        )

    def request_slots(self, ratio: int) -> Tensor:
        """int64 [R, max_seq_len // ratio]: slots of every request's compressed entries."""
        entries = torch.arange(self.max_seq_len // ratio, device=self.position.device)
        return entry_slots(self.page_table, entries.expand(self.page_table.shape[0], -1), ratio)

    def tensors(self) -> Iterator[Tensor]:
        """All of its tensors, in one order."""
        yield from (self.position, self.request, self.query, self.window_write, self.window)
        yield self.page_table
        for rows in self.compression.values():
            yield from (rows.token, rows.position, rows.slots, rows.step_row, rows.ring_row)
            yield rows.ring_write_row
        if self.dense_slots is not None:
            yield self.dense_slots


DECODE_ROWS = 8
"""The most rows of a request in a step that is served as decode: a token and the drafts that are
verified with it read the same cache as the token alone, and weights are read for few rows."""


def phase(max_queries: int) -> str:
    """ "decode" for a step in which no request has more than DECODE_ROWS rows, else "prefill"."""
    return "decode" if max_queries <= DECODE_ROWS else "prefill"


def context_bucket(seq_len: int, context_len: int) -> int:
    """The `max_seq_len` that a static step plans for when its longest sequence has `seq_len`
    tokens: a power of two, so that few shapes occur, and at most `context_len`."""
    return min(max(1024, 1 << (seq_len - 1).bit_length()), context_len)


def static_windows(tokens: int, requests: int, ratio: int) -> int:
    """The most windows of `ratio` that `tokens` rows of `requests` requests complete."""
    return min(tokens, tokens // ratio + requests)
