"""Scores of the lightning indexer: paged FP8 keys against the FP8 queries of all heads, relu,
weighted sum over heads.

Work is cut into tiles of BLOCK_KEYS entries for QUERIES consecutive rows of one request. A fixed
number of programs shares all tiles of the step evenly: each counts the tiles of all rows from their
positions and finds its own share. So the grid depends on the chip and work on the contexts, never
on the longest sequence a captured graph allows.

Keys are the rows and heads the columns of a product, so that the sum over heads stays within a
lane's registers. Byte floor: 132 for every visible entry of a request, 4 for every logit, 132·n for
a row of n heads. Multiply-adds: 128·n a logit, 62 for each byte of key and row at n = 64: decode is
bound by memory, prefill by the matrix units.

Variants: heads, one query or several a program (decode or prefill), few tokens or many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import device
from ...cache import layout
from ...cache.step_plan import StepPlan
from ...cache.stores import PackedIndexCache
from ..strides import require_contiguous, require_dense_rows
from .formats import fp8_operand, is_fnuz
from .sparse_mla import compute_units

_RATIO = tl.constexpr(4)
_DIM = tl.constexpr(layout.INDEX_DIM)
_PAGE_ENTRIES = tl.constexpr(layout.INDEX_PAGE_ENTRIES)
_SCAN = 1024
_LEAST_SCAN = 64  # of a decode step
_LEAST_HEADS = 16  # columns of the smallest product


@dataclass(frozen=True)
class Config:
    """Tile and launch shape of one phase."""

    queries: int
    block_keys: int
    num_warps: int
    num_stages: int
    programs_a_unit: int
    """Programs launched for each compute unit."""


# gfx950: waves side by side along the keys, two a SIMD, so that one's products hide the other's
# relu and sums; a group of two rows would halve the keys' traffic from L2 but leave one wave.
# sm_90: its matrix instructions want four warps.
CONFIGS = {
    ("gfx", "decode"): Config(1, 128, 2, 1, 8),
    ("gfx", "prefill"): Config(1, 128, 2, 1, 8),
    ("sm", "decode"): Config(1, 128, 4, 3, 4),
    ("sm", "prefill"): Config(2, 128, 4, 3, 3),
}


def _config(phase: str) -> Config:
    return CONFIGS["sm" if device.arch().startswith("sm_") else "gfx", phase]


@triton.jit
def _tiles(position, query, row, tokens, QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Tiles that start at each of `row`: none unless it leads a group of QUERIES rows of its
    request."""
    inside = row < tokens
    leads = tl.load(query + row, mask=inside, other=1) % QUERIES == 0
    last = tl.load(position + row, mask=inside, other=0) + QUERIES - 1
    return tl.where(inside & leads, tl.cdiv((last + 1) // _RATIO, BLOCK_KEYS), 0)


@triton.jit
def _share(
    position, query, tokens, QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, SCAN: tl.constexpr
):
    """(row, tile within the row, number of tiles) where this program's even share of all tiles
    begins."""
    total = tl.zeros((), tl.int64)
    for start in range(0, tokens, SCAN):
        total += tl.sum(
            _tiles(position, query, start + tl.arange(0, SCAN), tokens, QUERIES, BLOCK_KEYS), 0
        )
    share = tl.cdiv(total, tl.num_programs(0))
    first = tl.program_id(0) * share
    row, before, done = tl.zeros((), tl.int64), tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for start in range(0, tokens, SCAN):
        tiles = _tiles(position, query, start + tl.arange(0, SCAN), tokens, QUERIES, BLOCK_KEYS)
        end = done + tl.cumsum(tiles, 0)
        row += tl.sum((end <= first).to(tl.int64), 0)
        before = tl.maximum(before, tl.max(tl.where(end <= first, end, 0), 0))
        done += tl.sum(tiles, 0)
    return row, first - before, tl.minimum(share, total - first)


@triton.jit
def _relu(x):
    """max(x, 0) of fp32 `x` by its bits, which is one instruction; a float maximum takes a second
    to quiet NaN."""
    return tl.maximum(x.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)


@triton.jit
def _score(
    q,
    weights,
    keys,
    key_scales,
    position,
    page_row,
    logits,
    row,
    count,
    first_block,
    last_block,
    entries,
    page_bytes,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    FNUZ: tl.constexpr,
):
    """Logits of rows `row` .. `row + count - 1` at blocks `first_block` .. `last_block - 1` of
    their request."""
    member = tl.arange(0, QUERIES)
    visible = (tl.load(position + row + member, mask=member < count, other=-1) + 1) // _RATIO
    most = tl.max(visible, 0)
    column, channel = tl.arange(0, QUERIES * BLOCK_HEADS), tl.arange(0, _DIM)
    real = (column // BLOCK_HEADS < count) & (column % BLOCK_HEADS < HEADS)
    at = (row + column // BLOCK_HEADS) * HEADS + column % BLOCK_HEADS
    query = fp8_operand(
        tl.load(q + at[None, :] * _DIM + channel[:, None], mask=real[None, :], other=0.0), FNUZ
    )
    weight = tl.load(weights + at, mask=real, other=0.0) * (4.0 if FNUZ else 1.0)
    for block in range(first_block, last_block):
        entry = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        # Entries that nobody sees are taken from page 0, which belongs to nobody: the wide loads
        # need no mask.
        page = tl.load(page_row + entry // _PAGE_ENTRIES, mask=entry < most, other=0)
        start, within = page * page_bytes, entry % _PAGE_ENTRIES
        key = fp8_operand(tl.load(keys + (start + within * _DIM)[:, None] + channel[None, :]), FNUZ)
        scale = tl.load(key_scales + (start + _PAGE_ENTRIES * _DIM) // 4 + within)
        score = _relu(tl.dot(key, query)) * weight[None, :]
        score = tl.sum(tl.reshape(score, (BLOCK_KEYS, QUERIES, BLOCK_HEADS)), 2) * scale[:, None]
        tl.store(
            logits + (row + member)[None, :] * entries + entry[:, None],
            score,
            mask=entry[:, None] < visible[None, :],
        )


@triton.jit(do_not_specialize=("tokens", "entries", "pages"))
def indexer_logits_kernel(
    q,
    weights,
    keys,
    key_scales,
    position,
    request,
    query,
    page_table,
    logits,
    tokens,
    entries,
    pages,
    page_bytes,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SCAN: tl.constexpr,
    FNUZ: tl.constexpr,
):
    """Grid: any number of programs; each takes an even share of the tiles of all rows."""
    row, block, left = _share(position, query, tokens, QUERIES, BLOCK_KEYS, SCAN)
    member = tl.arange(0, QUERIES)
    while left > 0:
        owner = tl.load(request + row)
        mine = tl.load(request + row + member, mask=row + member < tokens, other=-1) == owner
        count = tl.sum(mine.to(tl.int32), 0)
        last = tl.cdiv((tl.load(position + row) + QUERIES) // _RATIO, BLOCK_KEYS)
        run = tl.minimum(last - block, left)
        _score(
            q,
            weights,
            keys,
            key_scales,
            position,
            page_table + owner * pages,
            logits,
            row,
            count,
            block,
            block + run,
            entries,
            page_bytes,
            HEADS,
            BLOCK_HEADS,
            QUERIES,
            BLOCK_KEYS,
            FNUZ,
        )
        left -= run
        block = tl.zeros((), tl.int64)
        row += count


def _programs(config: Config, tokens: int, entries: int, q: Tensor) -> int:
    return min(
        compute_units(q) * config.programs_a_unit, tokens * triton.cdiv(entries, config.block_keys)
    )


def indexer_logits(q: Tensor, weights: Tensor, cache: PackedIndexCache, plan: StepPlan) -> Tensor:
    """The operator of the same name for e4m3 `q` and a packed cache; logits that a row does not see
    stay unwritten."""
    require_contiguous(
        "indexer_logits", q=q, weights=weights, position=plan.position, request=plan.request
    )
    require_dense_rows("indexer_logits", page_table=plan.page_table)
    tokens, heads, _ = q.shape
    entries = plan.max_seq_len // 4
    logits = torch.empty(tokens, entries, dtype=torch.float32, device=q.device)
    if logits.numel():
        config, pages, fnuz = _config(plan.phase), cache.pages, is_fnuz()
        codes = torch.uint8 if fnuz else torch.float8_e4m3fn
        indexer_logits_kernel[(_programs(config, tokens, entries, q),)](
            q.view(codes),
            weights,
            pages.view(codes),
            pages.view(torch.float32),
            plan.position,
            plan.request,
            plan.query,
            plan.page_table,
            logits,
            tokens,
            entries,
            plan.page_table.stride(0),
            pages.stride(0),
            HEADS=heads,
            BLOCK_HEADS=max(_LEAST_HEADS, triton.next_power_of_2(heads)),
            QUERIES=config.queries,
            BLOCK_KEYS=config.block_keys,
            SCAN=_LEAST_SCAN if tokens <= _LEAST_SCAN else _SCAN,
            FNUZ=fnuz,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return logits
