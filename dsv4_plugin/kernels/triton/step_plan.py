"""The step plan on the device: one program a row, a page block, or a window; nothing waits for a
length.

Windows are numbered over the requests of the step, as many rows as could at most be completed; a
program finds its request by counting the windows of those before it. Rows past the last window are
padding. Shapes follow from the shapes of the inputs alone, so a step can be captured in a graph and
its plan refreshed in place.

Variants: the rings and whether a plan may shrink (rows), the ratio (windows).

Byte floor a row: 128 slots read through two tables and written, 128 · (4 + 8 + 8), and some 50; a
window of W items: 20 · W. Once a step, not once a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache import layout
from ...cache.step_plan import RING_ROWS, WINDOW, Compression, StepPlan, static_windows
from ..strides import require_contiguous, require_dense_rows

_PAGE = tl.constexpr(layout.PAGE_TOKENS)
_WINDOW = tl.constexpr(WINDOW)
_PAGES_A_PROGRAM = 256
_ENTRIES_A_PROGRAM = 256
_SCAN = 64
"""Requests that a window's program counts at once, one a lane of its wave."""


@triton.jit
def _window_slot(slot_table, table_stride, full_to_window, row, position, present):
    """Window slot of each `position` of table row `row`; -1 where not `present`."""
    full = tl.load(slot_table + row * table_stride + position, mask=present, other=0).to(tl.int64)
    return tl.load(full_to_window + full, mask=present, other=-1).to(tl.int64)


@triton.jit
def _ring_row(
    slot_table,
    table_stride,
    full_to_window,
    row,
    position,
    present,
    RATIO: tl.constexpr,
    RING: tl.constexpr,
):
    """Row of the ring of RING rows (of a window page for ratio 4, of a request for 128); -1 where
    not `present`."""
    if RATIO == 4:
        slot = _window_slot(slot_table, table_stride, full_to_window, row, position, present)
        ring_row = slot // _PAGE * RING + slot % RING
    else:
        ring_row = row * RING + position % RING
    return tl.where(present, ring_row, -1)


@triton.jit
def rows_kernel(
    positions,
    requests,
    out_slots,
    prefix_lens,
    seq_lens,
    slot_table,
    table_stride,
    slot_rows,
    full_to_window,
    queries,
    window_writes,
    windows,
    kept_4,
    kept_128,
    RING_4: tl.constexpr,
    RING_128: tl.constexpr,
    MAY_SHRINK: tl.constexpr,
):
    """Grid (T): what a row writes and sees in the window, and where the rings keep it; a ring of 0
    is none."""
    token = tl.program_id(0).to(tl.int64)
    position, request = tl.load(positions + token), tl.load(requests + token)
    row = tl.load(slot_rows + request).to(tl.int64)
    tl.store(queries + token, position - tl.load(prefix_lens + request))
    tl.store(window_writes + token, tl.load(full_to_window + tl.load(out_slots + token)))
    seen = position - (_WINDOW - 1) + tl.arange(0, _WINDOW)
    slot = _window_slot(slot_table, table_stride, full_to_window, row, seen, seen >= 0)
    tl.store(windows + token * _WINDOW + tl.arange(0, _WINDOW), tl.where(slot > 0, slot, -1))
    length = tl.load(seq_lens + request)
    if MAY_SHRINK:
        length = tl.minimum(length, tl.load(prefix_lens + request) + 1)
    if RING_4 > 0:
        # The unfinished window and the one before it; and the end of a page, for whoever continues
        # after that page.
        kept = (position >= length // 4 * 4 - 4) | (position % _PAGE >= _PAGE - 4)
        tl.store(
            kept_4 + token,
            _ring_row(slot_table, table_stride, full_to_window, row, position, kept, 4, RING_4),
        )
    if RING_128 > 0:
        kept = position >= length // 128 * 128
        tl.store(
            kept_128 + token,
            _ring_row(slot_table, table_stride, full_to_window, row, position, kept, 128, RING_128),
        )


# once a step: stores of 8 bytes a lane instead of 16 cost less than a compilation for each length
@triton.jit(do_not_specialize=("pages",))
def pages_kernel(
    seq_lens, slot_table, table_stride, slot_rows, page_table, pages, BLOCK: tl.constexpr
):
    """Grid (R, ceil(pages / BLOCK)): pages of a request up to its length; 0, nobody's, up to the
    end of the table."""
    request = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(slot_rows + request).to(tl.int64)
    slot = tl.load(
        slot_table + row * table_stride + page * _PAGE,
        mask=page * _PAGE < tl.load(seq_lens + request),
        other=0,
    )
    tl.store(page_table + request * pages + page, slot.to(tl.int64) // _PAGE, mask=page < pages)


@triton.jit
def _window_of(prefix_lens, seq_lens, requests, row, RATIO: tl.constexpr, SCAN: tl.constexpr):
    """(request, windows completed and rows of the step before it) of completed window `row` of the
    step."""
    owner, done, rows, end = (
        0,
        tl.zeros((), tl.int64),
        tl.zeros((), tl.int64),
        tl.zeros((), tl.int64),
    )
    for start in range(0, requests, SCAN):
        request = start + tl.arange(0, SCAN)
        prefix = tl.load(prefix_lens + request, mask=request < requests, other=0)
        length = tl.load(seq_lens + request, mask=request < requests, other=0)
        windows = length // RATIO - prefix // RATIO
        before = (end + tl.cumsum(windows, 0) <= row) & (request < requests)
        owner += tl.sum(before.to(tl.int32), 0)
        done += tl.sum(tl.where(before, windows, 0), 0)
        rows += tl.sum(tl.where(before, length - prefix, 0), 0)
        end += tl.sum(windows, 0)
    return owner, done, rows


@triton.jit(do_not_specialize=("requests",))
def windows_kernel(
    prefix_lens,
    seq_lens,
    out_slots,
    slot_table,
    table_stride,
    slot_rows,
    full_to_window,
    requests,
    tokens,
    positions,
    slots,
    step_rows,
    ring_rows,
    RATIO: tl.constexpr,
    RING: tl.constexpr,
    ITEMS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid (N): the completed windows of one ratio, in the order of the step's rows, then
    padding."""
    window = tl.program_id(0).to(tl.int64)
    request, done, rows = _window_of(prefix_lens, seq_lens, requests, window, RATIO, SCAN)
    token, first, slot = (
        tl.full((), -1, tl.int64),
        tl.full((), -1, tl.int64),
        tl.full((), -1, tl.int64),
    )
    item = tl.arange(0, ITEMS)
    step_row, ring_row = tl.full((ITEMS,), -1, tl.int64), tl.full((ITEMS,), -1, tl.int64)
    if request < requests:
        prefix = tl.load(prefix_lens + request).to(tl.int64)
        first = (prefix // RATIO + window - done) * RATIO
        end = first + RATIO - 1
        token = rows + end - prefix
        slot = tl.load(out_slots + token).to(tl.int64) // RATIO
        position = end - (ITEMS - 1) + item
        in_step = position >= prefix
        step_row = tl.where(in_step, rows + position - prefix, -1)
        ring_row = _ring_row(
            slot_table,
            table_stride,
            full_to_window,
            tl.load(slot_rows + request).to(tl.int64),
            position,
            (position >= 0) & ~in_step,
            RATIO,
            RING,
        )
    tl.store(tokens + window, token)
    tl.store(positions + window, first)
    tl.store(slots + window, slot)
    tl.store(step_rows + window * ITEMS + item, step_row)
    tl.store(ring_rows + window * ITEMS + item, ring_row)


@triton.jit(do_not_specialize=("entries",))
def dense_kernel(
    positions,
    requests,
    slot_table,
    table_stride,
    slot_rows,
    dense_slots,
    entries,
    BLOCK: tl.constexpr,
):
    """Grid (T, ceil(entries / BLOCK)): slots of the ratio-128 entries that a row sees, then -1."""
    token = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(slot_rows + tl.load(requests + token)).to(tl.int64)
    seen = entry < (tl.load(positions + token) + 1) // 128
    slot = tl.load(slot_table + row * table_stride + entry * 128, mask=seen, other=0)
    slot = tl.where(seen, slot.to(tl.int64) // 128, -1)
    tl.store(dense_slots + token * entries + entry, slot, mask=entry < entries)


def _empty(
    position: Tensor,
    request: Tensor,
    requests: int,
    max_queries: int,
    max_seq_len: int,
    rings: Mapping[int, int],
) -> StepPlan:
    """A static plan whose other tensors nobody wrote yet."""
    tokens = position.shape[0]

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=position.device)

    def compression(ratio: int) -> Compression:
        halves, count = 2 if ratio == 4 else 1, static_windows(tokens, requests, ratio)
        rows = (numbers(count) for _ in range(3))
        items = (numbers(count, ratio * halves) for _ in range(2))
        return Compression(ratio, halves, *rows, *items, numbers(tokens))

    return StepPlan(
        position=position,
        request=request,
        query=numbers(tokens),
        max_queries=max_queries,
        max_seq_len=max_seq_len,
        window_write=numbers(tokens),
        window=numbers(tokens, WINDOW),
        page_table=numbers(requests, triton.cdiv(max_seq_len, layout.PAGE_TOKENS)),
        compression={ratio: compression(ratio) for ratio in rings},
        dense_slots=numbers(tokens, max_seq_len // 128) if 128 in rings else None,
        static=True,
    )


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
    """The operator of the same name; its shapes are static whether `static_rows` asks for it or
    not."""
    require_contiguous(
        "build_step_plan",
        position=position,
        request=request,
        out_slot=out_slot,
        prefix_lens=prefix_lens,
        seq_lens=seq_lens,
        slot_row=slot_row,
        full_to_window=full_to_window,
    )
    require_dense_rows("build_step_plan", slot_table=slot_table)
    tokens, requests = position.shape[0], seq_lens.shape[0]
    plan = out or _empty(position, request, requests, max_queries, max_seq_len, rings)
    for kept, given in ((plan.position, position), (plan.request, request)):
        if kept is not given:
            kept.copy_(given)
    tables = (slot_table, slot_table.stride(0), slot_row)
    kept = {ratio: rows.ring_write_row for ratio, rows in plan.compression.items()}
    if tokens:
        rows_kernel[(tokens,)](
            position,
            request,
            out_slot,
            prefix_lens,
            seq_lens,
            *tables,
            full_to_window,
            plan.query,
            plan.window_write,
            plan.window,
            kept.get(4, plan.query),
            kept.get(128, plan.query),
            RING_4=rings.get(4, 0),
            RING_128=rings.get(128, 0),
            MAY_SHRINK=may_shrink,
            num_warps=1,
        )
    if plan.page_table.numel():
        pages = plan.page_table.shape[1]
        pages_kernel[(requests, triton.cdiv(pages, _PAGES_A_PROGRAM))](
            seq_lens, *tables, plan.page_table, pages, BLOCK=_PAGES_A_PROGRAM, num_warps=1
        )
    if plan.dense_slots is not None and plan.dense_slots.numel():
        entries = plan.dense_slots.shape[1]
        dense_kernel[(tokens, triton.cdiv(entries, _ENTRIES_A_PROGRAM))](
            position,
            request,
            *tables,
            plan.dense_slots,
            entries,
            BLOCK=_ENTRIES_A_PROGRAM,
            num_warps=1,
        )
    for ratio, rows in plan.compression.items():
        if rows.token.shape[0]:
            windows_kernel[(rows.token.shape[0],)](
                prefix_lens,
                seq_lens,
                out_slot,
                *tables,
                full_to_window,
                requests,
                rows.token,
                rows.position,
                rows.slots,
                rows.step_row,
                rows.ring_row,
                RATIO=ratio,
                RING=rings[ratio],
                ITEMS=ratio * rows.halves,
                SCAN=_SCAN,
                num_warps=1,
            )
    return plan
