"""Every index tensor of one step, built once from sequence lengths and slot tables and read by all
layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.layout import PAGE_TOKENS, entry_slots, request_ring_row, window_ring_row
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
    out: StepPlan | None = None,
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
    `shrinkable_rows` rows a request. With `out`, a static plan of the same shapes, the values go
    into its tensors and it is returned.
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
    plan = StepPlan(
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
        dense_slots=_dense_slots(position, page_table[request], max_seq_len)
        if 128 in rings
        else None,
        static=static_rows,
    )
    return plan if out is None else _into(plan, out)


def _dense_slots(position: Tensor, pages: Tensor, max_seq_len: int) -> Tensor:
    """Slots of the ratio-128 entries that each row sees, by its own `pages` [T, ..]; -1 past
    them."""
    entries = torch.arange(max_seq_len // 128, device=position.device)
    slots = entry_slots(pages, entries.expand(pages.shape[0], -1), 128)
    return slots.masked_fill_(entries >= ((position + 1) // 128).unsqueeze(-1), -1)


def _into(plan: StepPlan, out: StepPlan) -> StepPlan:
    for mine, theirs in zip(plan.tensors(), out.tensors(), strict=True):
        if mine is not theirs:
            theirs.copy_(mine)
    return out


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
        kept = self.ring_row(ratio, ring, self.request, self.position)
        kept = kept.masked_fill(~self._kept(ratio), -1)
        request, token, present = self._completed(ratio, static_rows)
        if not token.shape[0]:  # as in most decode steps that are not captured
            items = token.new_empty(0, ratio * halves)
            return Compression(ratio, halves, token, token, token, items, items, kept)
        end = self.position[token]
        age = torch.arange(ratio * halves - 1, -1, -1, device=end.device)
        item, row = end.unsqueeze(-1) - age, token.unsqueeze(-1) - age
        shown, prefix = present.unsqueeze(-1), self.prefix_lens[request].unsqueeze(-1)
        in_step, in_ring = shown & (item >= prefix), shown & (item >= 0) & (item < prefix)
        ring_row = self.ring_row(ratio, ring, request.unsqueeze(-1), item)
        return Compression(
            ratio=ratio,
            halves=halves,
            token=token.masked_fill(~present, -1),
            position=(end + 1 - ratio).masked_fill_(~present, -1),
            slots=(self.out_slot[token] // ratio).masked_fill_(~present, -1),
            step_row=row.masked_fill_(~in_step, -1),
            ring_row=ring_row.masked_fill(~in_ring, -1),
            ring_write_row=kept,
        )

    def _completed(self, ratio: int, static_rows: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(request, step's row that ends it, whether it is one) int64, int64, bool [N] of each
        window completed, in the order of the rows."""
        before, after = self.prefix_lens // ratio, self.seq_lens // ratio
        ends = (after - before).cumsum(0)
        if static_rows:
            count = static_windows(self.position.shape[0], ends.shape[0], ratio)
        else:
            count = int(ends[-1]) if ends.shape[0] else 0
            if not count:
                return ends[:0], ends[:0], ends[:0] > 0
        number = torch.arange(count, device=ends.device)
        request = torch.searchsorted(ends, number, right=True)
        present = request < ends.shape[0]
        request = request.clamp_max_(max(ends.shape[0] - 1, 0))
        rows = (self.seq_lens - self.prefix_lens).cumsum(0)  # where each request's rows end
        window = number - ends[request] + after[request]
        token = rows[request] - self.seq_lens[request] + (window + 1) * ratio - 1
        return request, token.masked_fill_(~present, 0), present

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
