"""The largest logit of each row and the lowest token id that has it.

A program finds the best of a stretch of the vocabulary, the next launch the best of those. A
candidate is one 64-bit number, the logit's order above and the id's complement below it, so a
maximum is all there is, and nothing depends on timing.

Byte floor of a row: 4 for each logit (2 in bf16), 8 written; 16 for each stretch of 8192.

Variants: type of the logits, stretches as a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...parallel import Group

_STRETCH = 8192
_LOWEST = tl.constexpr(-(1 << 31))
_MINUS_INF = tl.constexpr(-(1 << 31) + (1 << 23))
"""What -inf is in the order of `_candidate`."""
_LAST_ID = tl.constexpr((1 << 31) - 1)


@triton.jit
def _candidate(x, number):
    """int64 that orders by fp32 `x`, NaN as -inf, then by the lower int32 `number`."""
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, _LOWEST - bits, bits)  # -0 as 0
    order = tl.where(x == x, order, _MINUS_INF)
    return (order.to(tl.int64) << 32) | (number ^ _LAST_ID).to(tl.int64)


@triton.jit
def best_of_stretch_kernel(logits, best, stride, vocab, BLOCK: tl.constexpr):
    """Grid (T, stretches)."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + number, mask=number < vocab, other=float("-inf"))
    candidate = tl.max(_candidate(x.to(tl.float32), number), 0)
    tl.store(best + row * tl.num_programs(1) + tl.program_id(1), candidate)


@triton.jit
def best_of_all_kernel(best, out, stretches, BLOCK: tl.constexpr):
    """Grid (T): token ids of the best candidates."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    # what lies past the stretches repeats the first
    candidate = tl.load(best + row * stretches + tl.where(at < stretches, at, 0))
    tl.store(out + row, (tl.max(candidate, 0) & _LAST_ID) ^ _LAST_ID)


def sample_greedy(logits: Tensor, group: Group = Group()) -> Tensor:
    """The operator of the same name for fp32 or bf16 logits."""
    rows, share = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        stretches = triton.cdiv(share, _STRETCH)
        best = torch.empty(rows, stretches, dtype=torch.int64, device=logits.device)
        block = min(_STRETCH, triton.next_power_of_2(share))
        best_of_stretch_kernel[(rows, stretches)](
            logits, best, logits.stride(0), share, BLOCK=block, num_warps=8
        )
        if group.size > 1:
            # an id lies complemented in the low word: less is a higher id, here that of the whole
            best = group.all_gather(best - group.rank * share)
            best = best.transpose(0, 1).flatten(1).contiguous()
        best_of_all_kernel[(rows,)](
            best, out, best.shape[1], BLOCK=triton.next_power_of_2(best.shape[1]), num_warps=1
        )
    return out
