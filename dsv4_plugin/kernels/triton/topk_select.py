"""Exact top-k of each row, ascending entry numbers, ties to the lowest: a radix search over values held in registers.

A program reads a chunk of a row once, finds the k-th largest value two bits at a time by counting, and writes what it
keeps in order. Rows longer than a chunk keep k candidates of each chunk, and the candidates are selected from in turn:
since both steps keep the lowest numbers among equals, so does the whole. Nothing depends on timing, nothing is atomic.
How many candidates a row has follows from the entries it sees, so chunks past those end at once.

Byte floor of a row: 4 for each entry it sees, 8·k written. Candidates add 16·k / 8192 of the row (k = 1024: two bytes
an entry, half of the floor).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 8192
_LEAST_BLOCK = 1024
_LOWEST = tl.constexpr(-(1 << 31))


@triton.jit
def _ordered(x):
    """int32 that order as fp32 `x` does; -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _candidates(visible, topk, LEVEL: tl.constexpr, CHUNK: tl.constexpr):
    """Length of a row of `visible` entries after LEVEL selections, each of which keeps `topk` of every CHUNK."""
    for _ in tl.static_range(LEVEL):
        before = tl.maximum(visible - 1, 0) // CHUNK
        visible = before * topk + tl.minimum(visible - before * CHUNK, topk)
    return visible


@triton.jit
def _border(key, length, topk):
    """The largest threshold that at least `topk` of the keys reach, or one that exactly `topk` reach."""
    low = tl.zeros((), tl.int32)  # as an unsigned number; flipping the top bit orders it with the keys
    count, shift = length, 30
    while (shift >= 0) & (count > topk):
        step = tl.full((), 1, tl.int32) << shift
        reach = (key >= ((low + step) ^ _LOWEST)).to(tl.int64)
        reach += (key >= ((low + step + step) ^ _LOWEST)).to(tl.int64) << 20
        reach += (key >= ((low + step + step + step) ^ _LOWEST)).to(tl.int64) << 40
        counts = tl.sum(reach, 0)
        one, two, three = counts & 0xFFFFF, (counts >> 20) & 0xFFFFF, counts >> 40
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
    return low ^ _LOWEST


@triton.jit
def topk_select_kernel(values, numbers, visible, out_values, out_numbers, stride, out_stride, topk, LEVEL: tl.constexpr,
                       FINAL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (T, chunks): keeps the `topk` largest of a chunk of BLOCK values, in order, or all when there are fewer."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    length = tl.minimum(_candidates(tl.load(visible + row), topk, LEVEL, CHUNK) - begin, BLOCK)
    at = tl.arange(0, BLOCK)
    if length > 0:
        x = tl.load(values + row * stride + begin + at, mask=at < length, other=0.0)
        key = tl.where(at < length, _ordered(x), _LOWEST)
        border = _border(key, length, topk)
        above, equal = (key > border) & (at < length), (key == border) & (at < length)
        # Two running counts in one scan; both stay below 2^15.
        running = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        wanted = (topk - tl.sum(above.to(tl.int32), 0)).to(tl.int32)
        equals = running >> 16
        kept = above | (equal & (equals <= wanted))
        place = (running & 0xFFFF) + tl.minimum(equals, wanted) - 1
        number = begin + at
        if LEVEL > 0:
            number = tl.load(numbers + row * stride + begin + at, mask=at < length, other=0)
        out = row * out_stride + tl.program_id(1) * topk + place
        tl.store(out_numbers + out, number.to(out_numbers.dtype.element_ty), mask=kept)
        if not FINAL:
            tl.store(out_values + out, x, mask=kept)
    if FINAL:
        nothing = tl.full((BLOCK,), -1, out_numbers.dtype.element_ty)
        tl.store(out_numbers + row * out_stride + at, nothing, mask=(at >= length) & (at < topk))


def topk_select(logits: Tensor, visible: Tensor, topk: int) -> Tensor:
    """The operator of the same name; reads no logit that a row does not see."""
    tokens, entries = logits.shape
    topk = min(topk, entries)
    out = torch.empty(tokens, topk, dtype=torch.int64, device=logits.device)
    if not out.numel():
        return out
    values, numbers, level = logits, out, 0
    while entries > _CHUNK:
        chunks = triton.cdiv(entries, _CHUNK)
        kept_values = torch.empty(tokens, chunks * topk, dtype=torch.float32, device=logits.device)
        kept_numbers = torch.empty(tokens, chunks * topk, dtype=torch.int32, device=logits.device)
        topk_select_kernel[(tokens, chunks)](
            values, numbers, visible, kept_values, kept_numbers, values.stride(0), kept_values.stride(0), topk,
            LEVEL=level, FINAL=False, CHUNK=_CHUNK, BLOCK=_CHUNK, num_warps=16)
        values, numbers, level, entries = kept_values, kept_numbers, level + 1, chunks * topk
    block = max(triton.next_power_of_2(entries), _LEAST_BLOCK)
    topk_select_kernel[(tokens, 1)](
        values, numbers, visible, values, out, values.stride(0), out.stride(0), topk, LEVEL=level, FINAL=True,
        CHUNK=_CHUNK, BLOCK=block, num_warps=max(4, block // 512))
    return out
