"""Choice of experts in two launches: the router's logits, then scores, choice and weights of a row.

The hidden size is cut into 8 segments whose products are added in their order, by one program or
through memory by eight, which fill the chip in a decode step: a row's logits have the same bits in
any batch. Byte floor of T rows, E experts, hidden size d: 2·d·E for the gate, 2·d·T for the rows,
T·topk·12 written; 2·d·E·T operations.

Variants: of the logits few tokens or many, of the choice by score or by the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import device
from ..strides import require_contiguous
from .formats import INTERPRETED

_SEGMENTS = tl.constexpr(8)
BLOCK_K = 128


@dataclass(frozen=True)
class Tile:
    """Tile and launch shape of the logits."""

    tokens: int
    experts: int
    parts: int
    """Programs that share the segments of one tile: 8 or 1."""
    num_warps: int
    num_stages: int
    options: dict[str, int] = field(default_factory=dict)
    """Compiler options."""


# One instruction at every size, so that sums of a tile have one order.
_AMD = {"matrix_instr_nonkdim": 16}
_ANY = 1 << 62
# (architecture prefix, most rows) -> tile; the first row that fits is taken.
TILES: tuple[tuple[str, int, Tile], ...] = (
    ("gfx", 1023, Tile(16, 16, 8, 1, 3, _AMD)),
    ("gfx", _ANY, Tile(64, 64, 1, 4, 2, _AMD)),
    ("sm_", 1023, Tile(64, 16, 8, 4, 3)),
    ("sm_", _ANY, Tile(64, 64, 1, 4, 3)),
    ("cpu", _ANY, Tile(64, 512, 1, 1, 1)),  # interpreted: an operation takes as long on any tile
)


def tile_of(rows: int) -> Tile:
    """The tile of a step of `rows`."""
    arch = device.arch()
    return next(tile for name, most, tile in TILES if arch.startswith(name) and rows <= most)


@triton.jit(do_not_specialize=("tokens",))
def router_logits_kernel(
    x,
    gate,
    logits,
    tokens,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (ceil(T / BLOCK_TOKENS), ceil(E / BLOCK_EXPERTS), PARTS): sums of the program's
    segments, fp32 [PARTS, T, E]."""
    segment: tl.constexpr = (HIDDEN + _SEGMENTS * BLOCK_K - 1) // (_SEGMENTS * BLOCK_K) * BLOCK_K
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.program_id(1) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    part, channel = tl.program_id(2), tl.arange(0, BLOCK_K)
    rows = x + token[:, None] * HIDDEN + channel[None, :]
    columns = gate + expert[None, :] * HIDDEN + channel[:, None]
    here, there = token < tokens, expert < EXPERTS
    total = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
    for each in range(_SEGMENTS // PARTS):
        first = (part * (_SEGMENTS // PARTS) + each) * segment
        product = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
        for k in range(first, tl.minimum(first + segment, HIDDEN), BLOCK_K):
            row = tl.load(rows + k, mask=here[:, None], other=0.0)
            column = tl.load(columns + k, mask=there[None, :], other=0.0)
            if INTERPRETED:
                product += tl.dot(row.to(tl.float32), column.to(tl.float32), input_precision="ieee")
            else:
                product = tl.dot(row, column, product)
        total += product
    tl.store(
        logits + (part * tokens + token[:, None]) * EXPERTS + expert[None, :],
        total,
        mask=here[:, None] & there[None, :],
    )


@triton.jit
def _root_of_softplus(x):
    """sqrt(log(1 + e^x)) of fp32 `x`, to some ulp for every finite one.

    Below -20 softplus is e^x, whose root e^(x/2) lasts twice as far. Above, log(1 + u) of u =
    e^-|x| is log(w) · u / (w - 1) with w = 1 + u as rounded, which cancels that rounding.
    """
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x < -20.0, tl.exp(0.5 * x), tl.sqrt(tl.maximum(x, 0.0) + log1p))


@triton.jit(do_not_specialize=("tokens", "parts"))
def choose_kernel(
    logits,
    bias,
    tid2eid,
    token_ids,
    weights,
    experts,
    tokens,
    routed_scaling_factor,
    parts,
    EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK_TOPK: tl.constexpr,
    HASHED: tl.constexpr,
):
    """Grid (T): the experts of a row and their weights, from `logits` in `parts` sums."""
    row = tl.program_id(0).to(tl.int64)
    expert, choice = tl.arange(0, BLOCK_EXPERTS), tl.arange(0, BLOCK_TOPK)
    inside = expert < EXPERTS
    logit = tl.load(logits + row * EXPERTS + expert, mask=inside, other=0.0)
    for part in tl.static_range(1, _SEGMENTS):  # loads that are on their way together
        there = inside & (part < parts)
        logit += tl.load(logits + (part * tokens + row) * EXPERTS + expert, mask=there, other=0.0)
    score = _root_of_softplus(logit)
    token = tl.load(token_ids + row)
    real = token >= 0
    if HASHED:
        wanted = tl.load(
            tid2eid + tl.maximum(token, 0) * TOPK + choice, mask=choice < TOPK, other=0
        ).to(tl.int32)
    else:
        key = score + tl.load(bias + expert, mask=inside, other=0.0)
        # What is no number comes first, as in torch; it leaves the row's own numbers alone.
        key = tl.where(inside, tl.where(key == key, key, float("inf")), float("-inf"))
        left = inside
    chosen, kept = tl.zeros((BLOCK_TOPK,), tl.int32), tl.zeros((BLOCK_TOPK,), tl.float32)
    for place in tl.static_range(TOPK):
        if HASHED:
            best = tl.sum(tl.where(choice == place, wanted, 0), 0)
        else:
            highest = tl.max(tl.where(left, key, float("-inf")), 0)
            best = tl.min(tl.where(left & (key == highest), expert, BLOCK_EXPERTS), 0)
            left = left & (expert != best)
        chosen = tl.where(choice == place, best, chosen)
        kept = tl.where(choice == place, tl.sum(tl.where(expert == best, score, 0.0), 0), kept)
    weight = kept / (tl.sum(kept, 0) + 1e-20) * routed_scaling_factor
    at = row * TOPK + choice
    tl.store(weights + at, tl.where(real, weight, 0.0), mask=choice < TOPK)
    tl.store(experts + at, tl.where(real, chosen, -1).to(tl.int64), mask=choice < TOPK)


def route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    token_ids: Tensor,
    topk: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """The operator of the same name for bf16 `x` and `gate`."""
    require_contiguous("route", x=x, gate=gate, token_ids=token_ids)
    tokens, hidden = x.shape
    count = gate.shape[0]
    weights = torch.empty(tokens, topk, dtype=torch.float32, device=x.device)
    experts = torch.empty(tokens, topk, dtype=torch.int64, device=x.device)
    if not tokens:
        return weights, experts
    tile = tile_of(tokens)
    logits = torch.empty(tile.parts, tokens, count, dtype=torch.float32, device=x.device)
    grid = (
        triton.cdiv(tokens, tile.tokens),
        triton.cdiv(count, tile.experts),
        tile.parts,
    )
    router_logits_kernel[grid](
        x,
        gate,
        logits,
        tokens,
        EXPERTS=count,
        HIDDEN=hidden,
        PARTS=tile.parts,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_EXPERTS=tile.experts,
        BLOCK_K=BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **tile.options,
    )
    choose_kernel[(tokens,)](
        logits,
        bias,
        tid2eid,
        token_ids,
        weights,
        experts,
        tokens,
        routed_scaling_factor,
        tile.parts,
        EXPERTS=count,
        BLOCK_EXPERTS=triton.next_power_of_2(count),
        TOPK=topk,
        BLOCK_TOPK=triton.next_power_of_2(topk),
        HASHED=tid2eid is not None,
        num_warps=1,
    )
    return weights, experts
