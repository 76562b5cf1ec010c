"""Exact top-k of each row, ascending entry numbers, ties to the lowest: a radix search over values
held in registers.

A program reads a chunk of a row once, finds the k-th largest value two bits at a time by counting,
and writes what it keeps in order. Rows longer than a chunk keep k candidates of each chunk, and the
candidates are selected from in turn: since both steps keep the lowest numbers among equals, so does
the whole. Nothing depends on timing, nothing is atomic. How many candidates a row has follows from
the entries it sees, so chunks past those end at once.

The last selection hands out slots: it turns each number it keeps by the page table, k loads a row,
where a gather afterwards took a copy of the whole table for every row.

Variants: the last selection by the power of two of its entries, 2048 at least, and by the alignment
of k; the others are one.

Byte floor of a row: 4 for each entry it sees, 8·k written. A candidate adds 12 bytes, its number is
read only where it is kept (k = 1024: 0.75 bytes an entry of full chunks, a fifth of the floor).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache.layout import INDEX_PAGE_ENTRIES
from ...cache.step_plan import StepPlan
from ..strides import require_contiguous, require_dense_rows

_PAGE_ENTRIES = tl.constexpr(INDEX_PAGE_ENTRIES)
_CHUNK = 16384
_LEAST_BLOCK = 2048
_LOWEST = tl.constexpr(-(1 << 31))  # below the key of every value
_ROW = tl.constexpr(32)


@triton.jit
def _ordered(bits):
    """int32 that order as the fp32 of these `bits` do, all above _LOWEST; -0 is 0."""
    return tl.where(bits < 0, _LOWEST - bits, bits)


@triton.jit
def _candidates(visible, topk, level, CHUNK: tl.constexpr):
    """Length of a row of `visible` entries after `level` selections, each of which keeps `topk` of
    every CHUNK."""
    for _ in range(level):
        before = tl.maximum(visible - 1, 0) // CHUNK
        visible = before * topk + tl.minimum(visible - before * CHUNK, topk)
    return visible


@triton.jit
def _border(key, length, topk):
    """The largest threshold that at least `topk` of the keys reach, or one that exactly `topk`
    reach; and how many do."""
    # as an unsigned number; flipping the top bit orders it with the keys
    low = tl.zeros((), tl.int32)
    count, shift = length, 30
    while (shift >= 0) & (count > topk):
        step = tl.full((), 1, tl.int32) << shift
        # Three counts in one sum; each stays below 2^15.
        reach = (key >= ((low + step) ^ _LOWEST)).to(tl.int64)
        reach += (key >= ((low + step + step) ^ _LOWEST)).to(tl.int64) << 16
        reach += (key >= ((low + step + step + step) ^ _LOWEST)).to(tl.int64) << 32
        counts = tl.sum(reach, 0)
        both, three = counts.to(tl.int32), (counts >> 32).to(tl.int32)
        one, two = both & 0xFFFF, both >> 16
        if three >= topk:
            low += step + step + step
            count = three
        elif two >= topk:
            low += step + step
            count = two
        elif one >= topk:
            low += step
            count = one
        shift -= 2
    return tl.maximum(low ^ _LOWEST, _LOWEST + 1), count


@triton.jit
def _running(chosen):
    """How many are chosen up to each, itself included. A wave counts a row by itself; one number a
    row crosses waves."""
    rows = tl.reshape(chosen.to(tl.int32), (chosen.shape[0] // _ROW, _ROW))
    total = tl.sum(rows, 1)
    return tl.reshape(tl.cumsum(rows, 1) + (tl.cumsum(total, 0) - total)[:, None], chosen.shape)


# An unknown alignment makes loads one value wide, as scattered stores are: nothing is exchanged
# between threads for those.
@triton.jit(do_not_specialize=("stride", "pages", "level"))
def topk_select_kernel(
    values,
    numbers,
    visible,
    out_keys,
    out_numbers,
    stride,
    out_stride,
    topk,
    request,
    page_table,
    pages,
    level,
    LEVEL: tl.constexpr,
    FINAL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Grid (T, chunks): keeps the `topk` largest of a chunk of BLOCK values, in order, or all when
    there are fewer.

    With SLOTS the numbers written are the entries' slots by the page table of the row's request.

    LEVEL is `level`, or None where that is known at run time alone: a whole CHUNK fills the
    registers of both forms, and more values of fewer levels do not fit.

    `values` are the bits of fp32 at `level` 0 and the int32 keys of candidates after that.
    """
    if LEVEL is not None:
        level = LEVEL
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    length = tl.minimum(
        _candidates(tl.load(visible + row).to(tl.int32), topk, level, CHUNK) - begin, BLOCK
    )
    at = tl.arange(0, BLOCK)
    out = row * out_stride + tl.program_id(1) * topk
    if FINAL:
        nothing = tl.full((BLOCK,), -1, out_numbers.dtype.element_ty)
        tl.store(out_numbers + out + at, nothing, mask=(at >= length) & (at < topk))
    if length > 0:
        key = tl.load(values + row * stride + begin + at, mask=at < length, other=0)
        if level == 0:
            key = _ordered(key)
        key = tl.where(at < length, key, _LOWEST)
        border, count = _border(key, length, topk)
        if count > topk:  # too many equals: the last of them go
            wanted = topk - tl.sum((key > border).to(tl.int32), 0)
            key = tl.where((key == border) & (_running(key == border) > wanted), _LOWEST, key)
        kept = key >= border
        place = _running(kept) - 1
        number = begin + at
        if level > 0:
            number = tl.load(numbers + row * stride + begin + at, mask=kept, other=0)
        if not FINAL:
            tl.store(out_keys + out + place, key, mask=kept)
        number = number.to(out_numbers.dtype.element_ty)
        if SLOTS:
            page = page_table + tl.load(request + row) * pages + number // _PAGE_ENTRIES
            number = tl.load(page, mask=kept, other=0) * _PAGE_ENTRIES + number % _PAGE_ENTRIES
        tl.store(out_numbers + out + place, number, mask=kept)


def topk_select(logits: Tensor, visible: Tensor, topk: int, plan: StepPlan | None = None) -> Tensor:
    """The operator of the same name; reads no logit that a row does not see."""
    require_dense_rows("topk_select", logits=logits)
    require_contiguous("topk_select", visible=visible)
    tokens, entries = logits.shape
    topk = min(topk, entries)
    out = torch.empty(tokens, topk, dtype=torch.int64, device=logits.device)
    if not out.numel():
        return out
    # At level 0 an entry's number is its place: `numbers` are not read.
    values = numbers = logits.view(torch.int32)
    level = 0
    tables = (
        (out, out, 0)
        if plan is None
        else (plan.request, plan.page_table, plan.page_table.stride(0))
    )
    while entries > _CHUNK:
        chunks = triton.cdiv(entries, _CHUNK)
        kept_keys = torch.empty(tokens, chunks * topk, dtype=torch.int32, device=logits.device)
        kept_numbers = torch.empty(tokens, chunks * topk, dtype=torch.int32, device=logits.device)
        topk_select_kernel[(tokens, chunks)](
            values,
            numbers,
            visible,
            kept_keys,
            kept_numbers,
            values.stride(0),
            kept_keys.stride(0),
            topk,
            *tables,
            level,
            LEVEL=level,
            FINAL=False,
            CHUNK=_CHUNK,
            BLOCK=_CHUNK,
            SLOTS=False,
            num_warps=16,
        )
        values, numbers, level, entries = kept_keys, kept_numbers, level + 1, chunks * topk
    block = max(triton.next_power_of_2(entries), _LEAST_BLOCK)
    topk_select_kernel[(tokens, 1)](
        values,
        numbers,
        visible,
        values,
        out,
        values.stride(0),
        out.stride(0),
        topk,
        *tables,
        level,
        LEVEL=level if block == _CHUNK else None,
        FINAL=True,
        CHUNK=_CHUNK,
        BLOCK=block,
        SLOTS=plan is not None,
        num_warps=min(max(4, block // 512), 16),
    )
    return out
