"""Every index tensor of one step, built once from sequence lengths and slot tables and read by all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from ..cache.layout import PAGE_TOKENS, entry_slots, request_ring_row, window_ring_row
from .operator import operator

WINDOW = 128
RING_ROWS = MappingProxyType({4: 8, 128: 128})
"""Rows of a compressor ring by ratio: per window page for 4, per request for 128."""


@dataclass(frozen=True)
class Compression:
    """Windows of one compress ratio that this step completes, and the ring rows it leaves behind.

    N completed windows of W = ratio·halves items each (ratio 4 overlaps the previous window: halves = 2).
    """

    ratio: int
    halves: int
    token: Tensor
    """int64 [N]: the step's row that completes the window."""
    position: Tensor
    """int64 [N]: first position of the window, where its entry is rotated."""
    slots: Tensor
    """int64 [N]: slot of the entry."""
    present: Tensor
    """bool [N, W]: item is a position >= 0."""
    step_row: Tensor
    """int64 [N, W]: the step's row that holds the item, -1 if none."""
    ring_row: Tensor
    """int64 [N, W]: ring row that holds the item, -1 if none."""
    ring_write_token: Tensor
    """int64 [M]: the step's rows to keep in the ring."""
    ring_write_row: Tensor
    """int64 [M]: where; all different."""


@dataclass(frozen=True)
class StepPlan:
    """One step of R requests and T rows; the rows of a request are contiguous and its positions ascend by one."""

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
    """int64 [R, ceil(max_seq_len/256)]: page of each 256 tokens; what lies past a sequence's end is undefined."""
    compression: dict[int, Compression]
    """By compress ratio."""

    @property
    def phase(self) -> str:
        """"decode" when no request has more than one row, else "prefill"."""
        return "decode" if self.max_queries <= 1 else "prefill"

    def visible(self, ratio: int) -> Tensor:
        """int64 [T]: number of compressed entries the row sees, (position + 1) // ratio."""
        return (self.position + 1) // ratio

    def request_slots(self, ratio: int) -> Tensor:
        """int64 [R, max_seq_len // ratio]: slots of every request's compressed entries."""
        entries = torch.arange(self.max_seq_len // ratio, device=self.position.device)
        return entry_slots(self.page_table, entries.expand(self.page_table.shape[0], -1), ratio)

    @cached_property
    def dense_slots(self) -> Tensor:
        """int64 [T, max_seq_len // 128]: slots of all ratio-128 entries the row sees, -1 past them."""
        slots = self.request_slots(128)[self.request]
        seen = torch.arange(slots.shape[1], device=slots.device) < self.visible(128).unsqueeze(-1)
        return slots.masked_fill(~seen, -1)


@operator
def build_step_plan(position: Tensor, request: Tensor, out_slot: Tensor, prefix_lens: Tensor, seq_lens: Tensor,
                    slot_table: Tensor, slot_row: Tensor, full_to_window: Tensor, max_queries: int, max_seq_len: int,
                    rings: Mapping[int, int] = RING_ROWS) -> StepPlan:
    """The plan of one step (docs/model.md §4).

    `position`, `request`, `out_slot` int64 [T]: position, batch row and full slot of each new token. `prefix_lens`,
    `seq_lens` [R]: tokens before and after the step. `slot_table` [rows, L] holds the full slot of every position,
    `slot_row` [R] each request's row in it; `full_to_window` maps full slots to window slots, <= 0 where there is
    none. `rings`: ring rows a page (ratio 4) or a request (ratio 128) for the ratios to plan. Window slots and pages
    are aligned: slot % 256 == position % 256.
    """
    steps = _Steps(position, request, out_slot, prefix_lens, seq_lens, slot_table, slot_row, full_to_window)
    pages = torch.arange(0, max_seq_len, PAGE_TOKENS, device=position.device)
    page_table = slot_table[slot_row.unsqueeze(-1), pages].to(torch.int64) // PAGE_TOKENS
    last = position.unsqueeze(-1) - torch.arange(WINDOW - 1, -1, -1, device=position.device)
    window = steps.window_slot(request.unsqueeze(-1), last)
    return StepPlan(
        position=position, request=request, query=position - prefix_lens[request], max_queries=max_queries,
        max_seq_len=max_seq_len, window_write=full_to_window[out_slot],
        window=window.masked_fill(window <= 0, -1), page_table=page_table,
        compression={ratio: steps.compression(ratio, ring) for ratio, ring in rings.items()},
    )


@dataclass(frozen=True)
class _Steps:
    """The inputs of build_step_plan, for the parts it is made of."""

    position: Tensor
    request: Tensor
    out_slot: Tensor
    prefix_lens: Tensor
    seq_lens: Tensor
    slot_table: Tensor
    slot_row: Tensor
    full_to_window: Tensor

    def window_slot(self, request: Tensor, position: Tensor) -> Tensor:
        """Window slot of each (batch row, position); -1 for negative positions."""
        full = self.slot_table[self.slot_row[request], position.clamp_min(0)].to(torch.int64)
        return self.full_to_window[full].masked_fill(position < 0, -1)

    def ring_row(self, ratio: int, ring: int, request: Tensor, position: Tensor) -> Tensor:
        if ratio == 4:
            return window_ring_row(self.window_slot(request, position), ring)
        return request_ring_row(self.slot_row[request], position, ring)

    def compression(self, ratio: int, ring: int) -> Compression:
        halves = 2 if ratio == 4 else 1
        token = ((self.position + 1) % ratio == 0).nonzero().squeeze(-1)
        request, end = self.request[token].unsqueeze(-1), self.position[token].unsqueeze(-1)
        item = end - torch.arange(ratio * halves - 1, -1, -1, device=end.device)
        in_step = item >= self.prefix_lens[request]
        present = item >= 0
        kept = self._ring_positions(ratio)
        return Compression(
            ratio=ratio, halves=halves, token=token, position=end.squeeze(-1) + 1 - ratio,
            slots=self.out_slot[token] // ratio, present=present,
            step_row=torch.where(in_step, token.unsqueeze(-1) - (end - item), -1),
            ring_row=torch.where(present & ~in_step, self.ring_row(ratio, ring, request, item), -1),
            ring_write_token=kept,
            ring_write_row=self.ring_row(ratio, ring, self.request[kept], self.position[kept]),
        )

    def _ring_positions(self, ratio: int) -> Tensor:
        """Rows whose projections later steps need: the unfinished window and, for ratio 4, the one before it.

        The last four tokens of a page are kept as well, so that whoever continues after that page finds them.
        """
        whole = self.seq_lens[self.request] // ratio * ratio
        if ratio == 4:
            keep = (self.position >= whole - 4) | (self.position % PAGE_TOKENS >= PAGE_TOKENS - 4)
        else:
            keep = self.position >= whole
        return keep.nonzero().squeeze(-1)
