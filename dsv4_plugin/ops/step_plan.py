"""Every index tensor of one step, built once from sequence lengths and slot tables and read by all
layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.layout import PAGE_TOKENS, request_ring_row, window_ring_row
from ..cache.step_plan import RING_ROWS, WINDOW, Compression, StepPlan, static_windows
from .operator import Implementation, operator


@operator
def build_step_plan(
    position: Tensor,
    request: Tensor,
    out_slot: Tensor,
    prefix_lens: Tensor,
    seq_lens: Tensor,
    slot_table: Tensor,
    slot_row: Tensor,
    full_to_window: Tensor,
    max_queries: int,
    max_seq_len: int,
    rings: Mapping[int, int] = RING_ROWS,
    static_rows: bool = False,
    may_shrink: bool = False,
) -> StepPlan:
    """The plan of one step (docs/model.md §4).

    `position`, `request`, `out_slot` int64 [T]: position, batch row and full slot of each new
    token. `prefix_lens`, `seq_lens` [R]: tokens before and after the step. `slot_table` [rows, L]
    holds the full slot of every position, `slot_row` [R] each request's row in it; `full_to_window`
    maps full slots to window slots, <= 0 where there is none. `rings`: ring rows a page (ratio 4)
    or a request (ratio 128) for the ratios to plan. Window slots and pages are aligned: slot % 256
    == position % 256. With `static_rows` the shapes depend on the shapes of the inputs,
    `max_seq_len` and `rings` alone, as a captured graph needs; an implementation may always do so.
    With `may_shrink` a request may be cut back to any length past its prefix after the step, as
    drafts that are refused are, and the rings keep what each of those lengths needs; for up to
    `shrinkable_rows` rows a request.
    """
    # The fewest tokens that a request may have after the step.
    least = torch.minimum(seq_lens, prefix_lens + 1) if may_shrink else seq_lens
    steps = _Steps(
        position,
        request,
        out_slot,
        prefix_lens,
        seq_lens,
        least,
        slot_table,
        slot_row,
        full_to_window,
    )
    pages = torch.arange(0, max_seq_len, PAGE_TOKENS, device=position.device)
    page_table = slot_table[slot_row.unsqueeze(-1), pages].to(torch.int64) // PAGE_TOKENS
    last = position.unsqueeze(-1) - torch.arange(WINDOW - 1, -1, -1, device=position.device)
    window = steps.window_slot(request.unsqueeze(-1), last)
    return StepPlan(
        position=position,
        request=request,
        query=position - prefix_lens[request],
        max_queries=max_queries,
        max_seq_len=max_seq_len,
        window_write=full_to_window[out_slot],
        window=window.masked_fill(window <= 0, -1),
        page_table=page_table,
        compression={
            ratio: steps.compression(ratio, ring, static_rows) for ratio, ring in rings.items()
        },
    )


def build_draft_plan(
    prefix_lens: Tensor,
    block: int,
    slot_table: Tensor,
    slot_row: Tensor,
    full_to_window: Tensor,
) -> StepPlan:
    """The plan of a pass of a DSpark draft (docs/model.md §3.8): `block` rows for each request, at
    the positions that follow its `prefix_lens` [R] tokens.

    All rows of a request see the same keys: the last 128 tokens before the block and the whole
    block, whose latents are written to their own window slots. Those must be the request's already.
    No compressor is planned. The other arguments are those of `build_step_plan`.
    """
    span = torch.arange(-WINDOW, block, device=prefix_lens.device)
    seen = prefix_lens.unsqueeze(-1) + span
    full = slot_table[slot_row.unsqueeze(-1), seen.clamp_min(0)].to(torch.int64)
    window = full_to_window[full].to(torch.int64).masked_fill(seen < 0, -1)
    request = torch.arange(prefix_lens.shape[0], device=span.device).repeat_interleave(block)
    own = window[:, WINDOW:]
    return StepPlan(
        position=seen[:, WINDOW:].flatten(),
        request=request,
        query=span[WINDOW:].repeat(prefix_lens.shape[0]),
        max_queries=block if prefix_lens.shape[0] else 0,
        max_seq_len=0,
        window_write=own.flatten(),
        window=window.masked_fill(window <= 0, -1)[request],
        page_table=request.new_zeros(prefix_lens.shape[0], 0),
        compression={},
    )


@dataclass(frozen=True)
class _Steps:
    """The inputs of build_step_plan, for the parts it is made of."""

    position: Tensor
    request: Tensor
    out_slot: Tensor
    prefix_lens: Tensor
    seq_lens: Tensor
    least_lens: Tensor
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

    def compression(self, ratio: int, ring: int, static_rows: bool) -> Compression:
        halves = 2 if ratio == 4 else 1
        token = ((self.position + 1) % ratio == 0).nonzero().squeeze(-1)
        if static_rows:
            rows = static_windows(self.position.shape[0], self.seq_lens.shape[0], ratio)
            token = F.pad(token, (0, rows - token.shape[0]), value=-1)
        padding = token < 0
        request, end = self.request[token].unsqueeze(-1), self.position[token].unsqueeze(-1)
        item = end - torch.arange(ratio * halves - 1, -1, -1, device=end.device)
        in_step = item >= self.prefix_lens[request]
        in_ring = (item >= 0) & ~in_step
        step_row = torch.where(in_step, token.unsqueeze(-1) - (end - item), -1)
        ring_row = torch.where(in_ring, self.ring_row(ratio, ring, request, item), -1)
        return Compression(
            ratio=ratio,
            halves=halves,
            token=token,
            position=(end.squeeze(-1) + 1 - ratio).masked_fill(padding, -1),
            slots=(self.out_slot[token] // ratio).masked_fill(padding, -1),
            step_row=step_row.masked_fill(padding.unsqueeze(-1), -1),
            ring_row=ring_row.masked_fill(padding.unsqueeze(-1), -1),
            ring_write_row=self.ring_row(ratio, ring, self.request, self.position).masked_fill(
                ~self._kept(ratio), -1
            ),
        )

    def _kept(self, ratio: int) -> Tensor:
        """bool [T]: rows whose projections later steps need, the unfinished window and, for ratio
        4, the one before it.

        The last four tokens of a page are kept as well, so that whoever continues after that page
        finds them.
        """
        whole = self.least_lens[self.request] // ratio * ratio
        if ratio == 4:
            return (self.position >= whole - 4) | (self.position % PAGE_TOKENS >= PAGE_TOKENS - 4)
        return self.position >= whole


build_step_plan.add(
    Implementation(
        "triton", "dsv4_plugin.kernels.triton.step_plan:build_step_plan", packages=("triton",)
    )
)
