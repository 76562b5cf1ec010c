"""Attention over packed latents by slot lists, gather, dequantisation and softmax in one pass
(docs/kernels.md).

A program takes BLOCK_H heads of one token and walks its slots in tiles of BLOCK_K. A latent is key
and value, so a tile is fetched and dequantised once and used for both products. When tokens and
heads alone do not fill the device, the tiles of a token are split over programs and a second kernel
combines them. Whichever finishes a head rotates its last 64 channels back in registers, before the
one rounding.

Variants: heads and slots of a tile, whether tokens are split.

Floor of one token in one layer, n slots and h heads: 584 n + 2·1024 h + 256 bytes and 2·1024 n h
operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import device
from ...cache.layout import LATENT_DATA_BYTES, LATENT_DIM, LATENT_SCALE_BYTES, NOPE_DIM, SCALE_BLOCK
from ...cache.stores import PackedLatentCache
from ..strides import require_contiguous
from .entries import load_rotation, rotate
from .formats import INTERPRETED, fp8_to_fp32, to_bf16

LOG2_E = 1.4426950408889634
_MAX_SPLITS = 32
# A tile's step is about 1.2 µs (700 llvm-mca cycles of 4 clocks at 2.4 GHz), a part's 2·2056 bytes
# 0.7 ns at 6 TB/s. Not measured.
_PARTS_A_TILE = 1750
# tiles of a row that its length is read from in one load: 8192 slots of the 32-slot tile, 1 M
# tokens of c128
TILES = 256

_DATA_BYTES = tl.constexpr(LATENT_DATA_BYTES)
_SCALE_BYTES = tl.constexpr(LATENT_SCALE_BYTES)
_DIM = tl.constexpr(LATENT_DIM)
_NOPE = tl.constexpr(NOPE_DIM)
_BLOCK = tl.constexpr(SCALE_BLOCK)
_LOG2E = tl.constexpr(LOG2_E)
_BLOCKS = tl.constexpr(LATENT_DIM // SCALE_BLOCK)
_NOPE_BLOCKS = tl.constexpr(NOPE_DIM // SCALE_BLOCK)
# the interpreter cannot multiply bf16
_DOT = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)
_AT_ONCE = tl.constexpr(8)  # parts of a head that are on their way together
_NONE = tl.constexpr(-1e30)  # below every logit, and finite, so that differences of it are


@dataclass(frozen=True)
class Tile:
    """Heads and slots a program works on at once, and how it is compiled."""

    heads: int
    slots: int
    warps: int
    workgroups: int
    """Programs a compute unit holds: what the split count fills."""
    options: dict[str, int] = field(default_factory=dict)
    """Compiler options."""


# a wave has 16 heads of its own, so that no wave repeats a product
_AMD = {"matrix_instr_nonkdim": 16}
# (architecture prefix, most heads a rank) -> tile; the first row that fits is taken.
_TILE_TABLE: tuple[tuple[str, int, Tile], ...] = (
    ("gfx", 16, Tile(16, 32, 1, 4, _AMD)),
    ("gfx", 32, Tile(32, 32, 2, 2, _AMD)),
    ("gfx", 128, Tile(64, 32, 4, 1, _AMD)),
    ("sm_", 16, Tile(16, 32, 4, 2)),
    ("sm_", 128, Tile(32, 64, 8, 1)),
    ("cpu", 128, Tile(16, 128, 1, 1)),  # interpreted: an operation takes as long on any tile
)
_COMPUTE_UNITS = {"gfx950": 256, "gfx942": 304, "sm_90": 132}


def _tile(heads: int) -> Tile:
    arch = device.arch()
    return next(
        (tile for prefix, most, tile in _TILE_TABLE if arch.startswith(prefix) and heads <= most),
        Tile(16, 32, 4, 1),
    )


def compute_units(tensor: Tensor) -> int:
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return _COMPUTE_UNITS.get(device.arch(), 2)


def split_count(tokens: int, heads: int, head_blocks: int, tiles: int, programs: int) -> int:
    """Programs that share one token's tiles: a power of two, rounded down, of one tile or more, at
    most 32.

    Not more than leave the grid on the device, which holds `programs` at once, nor than pay: S
    splits take tiles / S steps and move S · tokens · heads parts, which is least together at S² =
    _PARTS_A_TILE · tiles / (tokens · heads).
    """
    rows = max(tokens * heads, 1)
    paying = math.isqrt(_PARTS_A_TILE * tiles // rows)
    room = min(programs // max(tokens * head_blocks, 1), paying, tiles, _MAX_SPLITS)
    return 1 << (max(room, 1).bit_length() - 1)


@triton.jit
def _pinned(x, CONSTRAINTS: tl.constexpr):
    """`x`, kept where it is: no instruction, but the compiler will not compute it twice to spare a
    change of layout."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("", CONSTRAINTS, [x], dtype=tl.bfloat16, is_pure=False, pack=2)


@triton.jit
def _latent_block(data, exponents, present, block: tl.constexpr, PIN: tl.constexpr):
    """Channels 64·block .. 64·block+63 of a tile of latents [slots, 64]; absent ones are 0.

    `data` [slots] points at the latents' bytes, `exponents` int64 [slots] holds their scale bytes.
    """
    columns = tl.arange(0, _BLOCK)[None, :]
    if block * _BLOCK < _NOPE:
        raw = tl.load(data[:, None] + (block * _BLOCK + columns), mask=present[:, None], other=0)
        byte = (exponents >> (8 * block)) & 0xFF
        scale = (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)  # ue8m0: 2^(byte - 127)
        return _pinned((fp8_to_fp32(raw) * scale[:, None]).to(_DOT), PIN)
    rope = (data + _NOPE).to(tl.pointer_type(tl.bfloat16))[:, None] + columns
    return tl.load(rope, mask=present[:, None], other=0.0).to(tl.float32).to(_DOT)


@triton.jit
def _row_tiles(slots_ptr, count, BLOCK_K: tl.constexpr, TILES: tl.constexpr):
    """Tiles of a slot list whose first slot is there; what is absent comes last."""
    first = tl.arange(0, TILES) * BLOCK_K
    slots = tl.load(slots_ptr + first, mask=first < count, other=-1)
    return tl.sum((slots >= 0).to(tl.int32))


@triton.jit
def _rounded(x, BF16: tl.constexpr):
    return to_bf16(x) if BF16 else x


@triton.jit(do_not_specialize=("compressed_count", "splits", "compressed_page", "compressed_shift"))
def _attend(
    q_ptr,
    out_ptr,
    lse_ptr,
    sink_ptr,
    cos_ptr,
    sin_ptr,
    window_ptr,
    window_slots_ptr,
    compressed_ptr,
    compressed_slots_ptr,
    window_count,
    compressed_count,
    window_page_bytes,
    compressed_page_bytes,
    heads,
    splits,
    compressed_page,
    compressed_shift,
    scale_log2,
    WINDOW_SHIFT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    TILES: tl.constexpr,
    PIN: tl.constexpr,
):
    """One split of BLOCK_H heads of one token: the output, or its part and base-2 log-sum-exp when
    SPLIT."""
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    live = head < heads
    window_slots_ptr += token * window_count
    compressed_slots_ptr += token * compressed_count
    window_tiles = tl.cdiv(window_count, BLOCK_K)
    tiles = window_tiles + _row_tiles(compressed_slots_ptr, compressed_count, BLOCK_K, TILES)
    share = tl.cdiv(tiles, splits)
    start, end = split * share, tl.minimum(split * share + share, tiles)
    row = (token * heads + head) * splits + split
    if SPLIT:
        if start >= end:
            tl.store(lse_ptr + row, tl.full([BLOCK_H], float("-inf"), tl.float32), mask=live)
            return

    column = tl.arange(0, _BLOCK)[None, :]
    q_row = q_ptr + (token * heads + head)[:, None] * _DIM + column
    q, o = (), ()
    for block in tl.static_range(_BLOCKS):
        q = q + (
            tl.load(q_row + block * _BLOCK, mask=live[:, None], other=0.0).to(tl.float32).to(_DOT),
        )
        o = o + (tl.zeros([BLOCK_H, _BLOCK], tl.float32),)
    amax = tl.full([BLOCK_H], _NONE, tl.float32)
    total = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)

    for tile in range(start, end):
        in_window = tile < window_tiles
        at = (tile - tl.where(in_window, 0, window_tiles)) * BLOCK_K + tl.arange(0, BLOCK_K)
        slots_ptr = tl.where(in_window, window_slots_ptr, compressed_slots_ptr)
        slot = tl.load(
            slots_ptr + at, mask=at < tl.where(in_window, window_count, compressed_count), other=-1
        )
        present = slot >= 0
        slot = tl.maximum(slot, 0).to(tl.int32)
        shift = tl.where(in_window, WINDOW_SHIFT, compressed_shift)
        page_slots = tl.where(in_window, 1 << WINDOW_SHIFT, compressed_page)
        page_bytes = tl.where(in_window, window_page_bytes, compressed_page_bytes)
        page = (
            tl.where(in_window, window_ptr, compressed_ptr)
            + (slot >> shift).to(tl.int64) * page_bytes
        )
        slot = slot & (page_slots - 1)
        data = tl.multiple_of(page + slot * _DATA_BYTES, 16)
        exponents = tl.load(
            (page + (page_slots * _DATA_BYTES + slot * _SCALE_BYTES)).to(tl.pointer_type(tl.int64)),
            mask=present,
            other=0,
        )
        latents = ()
        logits = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
        for block in tl.static_range(_BLOCKS):
            latents = latents + (_latent_block(data, exponents, present, block, PIN),)
            logits = tl.dot(q[block], tl.trans(latents[block]), logits, input_precision="ieee")
        logits = tl.where(present[None, :], logits * scale_log2, float("-inf"))
        new_amax = tl.maximum(amax, tl.max(logits, 1))
        p = tl.exp2(logits - new_amax[:, None])
        decay = tl.exp2(amax - new_amax)
        total = total * decay[:, None] + p
        updated = ()
        for block in tl.static_range(_BLOCKS):
            updated = updated + (
                tl.dot(
                    p.to(_DOT), latents[block], o[block] * decay[:, None], input_precision="ieee"
                ),
            )
        o, amax = updated, new_amax

    denominator = tl.sum(total, 1)
    if SPLIT:
        some = tl.where(denominator > 0, denominator, 1.0)
        tl.store(
            lse_ptr + row, tl.where(denominator > 0, amax + tl.log2(some), float("-inf")), mask=live
        )
        part = 1.0 / some
    else:
        pair = tl.arange(_NOPE // 2, _DIM // 2)[None, :]
        cos, sin = load_rotation(cos_ptr, sin_ptr, token, pair, _DIM)
        o = o[:_NOPE_BLOCKS] + (rotate(o[_NOPE_BLOCKS], cos, -sin),)
        sink = tl.load(sink_ptr + head, mask=live, other=0.0) * _LOG2E
        highest = tl.maximum(amax, sink)
        weight = tl.exp2(amax - highest)
        part = weight / (denominator * weight + tl.exp2(sink - highest))
    out_row = out_ptr + row[:, None] * _DIM + column
    for block in tl.static_range(_BLOCKS):
        tl.store(
            out_row + block * _BLOCK,
            _rounded(o[block] * part[:, None], not SPLIT),
            mask=live[:, None],
        )


@triton.jit(do_not_specialize=("splits",))
def combine(
    part_ptr, lse_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, heads, splits, MOST: tl.constexpr
):
    """One head of one token from its splits, at most MOST, and the sink, rotated back; splits that
    did not run weigh nothing and are not read."""
    row, token, head = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(0) // heads,
        tl.program_id(0) % heads,
    )
    cos, sin = load_rotation(cos_ptr, sin_ptr, token, tl.arange(0, _DIM // 2)[None, :], _DIM)
    split = tl.arange(0, MOST)
    lse = tl.load(lse_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    sink = tl.load(sink_ptr + head) * _LOG2E
    highest = tl.maximum(tl.max(lse, 0), sink)
    denominator = tl.sum(tl.exp2(lse - highest), 0) + tl.exp2(sink - highest)
    column = tl.arange(0, _DIM)[None, :]
    o = tl.zeros([1, _DIM], tl.float32)
    for first in range(0, splits, _AT_ONCE):
        for each in tl.static_range(_AT_ONCE):
            at = row * splits + first + each
            part_lse = tl.load(lse_ptr + at, mask=first + each < splits, other=float("-inf"))
            written = tl.where(part_lse > float("-inf"), _DIM, 0)
            part = tl.load(part_ptr + at * _DIM + column, mask=column < written, other=0.0)
            o += part * tl.exp2(part_lse - highest)
    tl.store(out_ptr + row * _DIM + column, to_bf16(rotate(o / denominator, cos, -sin)))


@dataclass(frozen=True)
class Walk:
    """One of the two kernels that walk a token's slots, as a launch needs it."""

    kernel: Any
    heads: int
    """Of one program."""
    slots: int
    """Of one tile."""
    workgroups: int
    """Programs a compute unit holds: what the split count fills."""
    constants: dict[str, Any]
    """Its own compile-time constants and compiler options."""
    zero_page: Callable[[torch.device, int], Tensor] | None = None
    """Makes the page that absent slots are read from, where the kernel has one."""


def launch(
    walk: Walk,
    q: Tensor,
    window_cache: PackedLatentCache,
    window: Tensor,
    compressed_cache: PackedLatentCache | None,
    compressed: Tensor | None,
    sink: Tensor,
    softmax_scale: float,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """The operator (ops/sparse_mla.py) by `walk`, for bf16 `q` and packed caches whose pages hold a
    power of two of slots.

    In a row of `compressed` no slot follows a -1. All tensors are contiguous; ValueError names one
    that is not.
    """
    tokens, heads, _ = q.shape
    out = torch.empty_like(q)
    if tokens == 0:
        return out
    if compressed is None or compressed.shape[1] == 0:
        compressed_cache, compressed = window_cache, window.new_empty(tokens, 0)
    require_contiguous(
        "sparse_mla", q=q, window=window, compressed=compressed, sink=sink, cos=cos, sin=sin
    )
    head_blocks = triton.cdiv(heads, walk.heads)
    compressed_tiles = triton.cdiv(compressed.shape[1], walk.slots)
    tiles = triton.cdiv(window.shape[1], walk.slots) + compressed_tiles
    splits = split_count(tokens, heads, head_blocks, tiles, compute_units(q) * walk.workgroups)
    part, lse = out, sink
    if splits > 1:
        part = q.new_empty(tokens, heads, splits, LATENT_DIM, dtype=torch.float32)
        lse = q.new_empty(tokens, heads, splits, dtype=torch.float32)
    pages, compressed_pages = window_cache.pages, compressed_cache.pages
    zero = ()
    if walk.zero_page is not None:
        zero = (walk.zero_page(q.device, max(pages.shape[1], compressed_pages.shape[1])),)
    walk.kernel[(tokens, head_blocks, splits)](
        q,
        part,
        lse,
        sink,
        cos,
        sin,
        *zero,
        pages,
        window,
        compressed_pages,
        compressed,
        window.shape[1],
        compressed.shape[1],
        pages.stride(0),
        compressed_pages.stride(0),
        heads,
        splits,
        compressed_cache.slots_per_page,
        compressed_cache.slots_per_page.bit_length() - 1,
        softmax_scale * LOG2_E,
        WINDOW_SHIFT=window_cache.slots_per_page.bit_length() - 1,
        BLOCK_H=walk.heads,
        BLOCK_K=walk.slots,
        SPLIT=splits > 1,
        TILES=max(TILES, triton.next_power_of_2(compressed_tiles)),
        **walk.constants,
    )
    if splits > 1:
        combine[(tokens * heads,)](
            part, lse, sink, cos, sin, out, heads, splits, MOST=_MAX_SPLITS, num_warps=4
        )
    return out


def sparse_mla(q: Tensor, *rest: Any) -> Tensor:
    """The operator of the same name on any GPU; see `launch`."""
    tile = _tile(q.shape[1])
    pin = "=r,0" if device.arch().startswith("sm_") else "=v,0"
    stages = 2 if device.arch().startswith("sm_") else 1
    constants = {"PIN": pin, "num_warps": tile.warps, "num_stages": stages, **tile.options}
    return launch(Walk(_attend, tile.heads, tile.slots, tile.workgroups, constants), q, *rest)
