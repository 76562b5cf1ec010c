"""Attention over packed latents for gfx950, the walk of kernels/triton/sparse_mla.py with its
layouts chosen by hand.

What Triton's own choice costs there, and this avoids (docs/kernels.md): a tile of latents is
dequantised once, with its scales, by one instruction for two values; it lies in local memory once,
read straight for the logits and transposed for the values; no wave repeats a product of another;
the bytes of the next tile are under way meanwhile.

Up to 16 heads, the four waves share a tile's slots for the logits and its channels for the values.
From 64 heads each wave has 16 heads of its own. In between, two by two.

Floor of one token in one layer, n slots and h heads: 584 n + 2·1024 h + 256 bytes and 2·1024 n h
operations.

Variants: heads and slots of a tile, whether tokens are split, as of the walk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ...cache.layout import LATENT_DATA_BYTES, LATENT_DIM, LATENT_SCALE_BYTES, NOPE_DIM, SCALE_BLOCK
from ..triton.sparse_mla import LOG2_E, Walk, launch

_WARPS = 4
_DATA_BYTES = gl.constexpr(LATENT_DATA_BYTES)
_SCALE_BYTES = gl.constexpr(LATENT_SCALE_BYTES)
_DIM = gl.constexpr(LATENT_DIM)
_BLOCK = gl.constexpr(SCALE_BLOCK)
_BLOCKS = gl.constexpr(LATENT_DIM // SCALE_BLOCK)
_NOPE = gl.constexpr(NOPE_DIM)
_NOPE_BLOCKS = gl.constexpr(NOPE_DIM // SCALE_BLOCK)
_NONE = gl.constexpr(-1e30)  # below every logit, and finite, so that differences of it are


@dataclass(frozen=True)
class _Tile:
    """Heads and slots a workgroup works on at once."""

    heads: int
    slots: int
    ahead: bool
    """Whether the next tile's bytes wait in registers; 64 heads leave none for them."""
    chunk: int
    """Channel blocks whose keys are read from local memory before the first is used."""
    sums: int
    """Independent partial sums of a logit: a product waits for the one it adds to."""


_TILES = (_Tile(16, 64, True, 8, 4), _Tile(32, 64, True, 8, 2), _Tile(64, 32, False, 2, 1))


@gluon.jit
def _uniform(x):
    """`x`, which is the same in all lanes, as a scalar. LLVM leaves no wait states within assembly,
    and this instruction needs one after a vector instruction that wrote its source."""
    return gl.inline_asm_elementwise(
        "s_nop 0\nv_readfirstlane_b32 $0, $1",
        "=s,v",
        [x],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _tile_slots(
    tile,
    end,
    window_tiles,
    window_slots_ptr,
    compressed_slots_ptr,
    window_count,
    compressed_count,
    place,
):
    """Slots int32 of a tile, -1 where there are none: past the list, and in tiles from `end` on."""
    there = tile < end
    tile = gl.minimum(tile, end - 1)  # a list that no tile is of may be no memory at all
    in_window = tile < window_tiles
    count = gl.where(in_window, window_count, compressed_count)
    at = (tile - gl.where(in_window, 0, window_tiles)) * place.shape[0] + place
    slots_ptr = gl.where(in_window, window_slots_ptr, compressed_slots_ptr)
    slot = gl.load(slots_ptr + gl.minimum(at, count - 1)).to(gl.int32)
    return gl.where(at < gl.where(there, count, 0), slot, -1)


@gluon.jit
def _tile_bytes(
    tile,
    slot,
    window_tiles,
    window_ptr,
    compressed_ptr,
    zero_ptr,
    window_page_bytes,
    compressed_page_bytes,
    word,
    channel,
    compressed_page,
    compressed_shift,
    WINDOW_SHIFT: gl.constexpr,
):
    """What the slots of a tile hold, as a tuple: 7 blocks of 16 words of 4 nope bytes, the rope
    channels, the scale bytes as one int64 a slot, and what to add to logits: 0, or -inf for absent
    slots, which read zeros."""
    in_window = tile < window_tiles
    page_slots = gl.where(in_window, 1 << WINDOW_SHIFT, compressed_page)
    page = slot >> gl.where(in_window, WINDOW_SHIFT, compressed_shift)
    page_bytes = gl.where(in_window, window_page_bytes, compressed_page_bytes).to(gl.int64)
    present = slot >= 0
    page = gl.where(
        present,
        gl.where(in_window, window_ptr, compressed_ptr) + page.to(gl.int64) * page_bytes,
        zero_ptr,
    )
    slot = slot & (page_slots - 1)
    data = gl.multiple_of(page + slot * _DATA_BYTES, 16)
    scales = gl.load(
        (page + (page_slots * _DATA_BYTES + slot * _SCALE_BYTES)).to(gl.pointer_type(gl.int64))
    )
    words = gl.convert_layout(data, gl.SliceLayout(1, word.type.layout.parent), assert_trivial=True)
    words = words.to(gl.pointer_type(gl.int32))[:, None] + word[None, :]
    blocks = ()
    for block in gl.static_range(_NOPE_BLOCKS):
        blocks = blocks + (gl.load(words + block * (_BLOCK // 4)),)
    rope = gl.load((data + _NOPE).to(gl.pointer_type(gl.bfloat16))[:, None] + channel[None, :])
    return blocks + (rope, scales, gl.where(present, 0.0, float("-inf")))


@gluon.jit
def _dequantised(words, scales, block: gl.constexpr, LOAD: gl.constexpr):
    """bf16 [slots, 64] of a block's words int32 [slots, 16]: e4m3 times 2^(scale byte - 127),
    exactly."""
    even = gl.join((words & 0xFF).to(gl.uint8), ((words >> 16) & 0xFF).to(gl.uint8))
    odd = gl.join(((words >> 8) & 0xFF).to(gl.uint8), ((words >> 24) & 0xFF).to(gl.uint8))
    raw = gl.reshape(gl.join(even, odd), [words.shape[0], _BLOCK])
    raw = gl.convert_layout(raw, LOAD, assert_trivial=True).to(gl.float8e4nv, bitcast=True)
    scale = ((scales >> (8 * block)) & 0xFF).to(gl.uint8)
    return gl.amd.cdna4.scaled_upcast(
        raw, gl.expand_dims(scale, 1).broadcast_to(raw.shape), gl.bfloat16
    )


@gluon.jit
def _row_maximum(logits, shared, MMA: gl.constexpr):
    """Maximum [heads] of `logits` [heads, slots]. With 16 heads the waves hold different slots and
    exchange the maxima of their lanes, 16 a head, through `shared`."""
    heads: gl.constexpr = logits.shape[0]
    slots: gl.constexpr = logits.shape[1]
    if heads == 16:
        ALL: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4], [0, 8]],
            [[1, 0], [2, 0], [4, 0], [8, 0], [0, 0], [0, 0]],
            [[0, 0], [0, 0]],
            [],
            [16, 16],
        )
        shared.store(gl.max(gl.reshape(logits, [heads, slots // 4, 4]), 2))
        return gl.convert_layout(
            gl.max(shared.load(ALL), 1), gl.SliceLayout(1, MMA), assert_trivial=True
        )
    else:
        return gl.max(logits, 1)


@gluon.jit
def _lane_sums(x):
    """Sums [heads, slots / 4] of the 4 neighbours that a lane holds."""
    return gl.sum(gl.reshape(x, [x.shape[0], x.shape[1] // 4, 4]), 2)


@gluon.jit
def _logits(q, tile, CHUNK: gl.constexpr, SUMS: gl.constexpr, MMA: gl.constexpr, KEY: gl.constexpr):
    """q·k [heads, slots] of the latents in `tile`, 8 blocks [slots, 64] in local memory."""
    heads: gl.constexpr = q[0].shape[0]
    slots: gl.constexpr = tile[0].shape[0]
    sums, keys = (), ()
    for block in gl.static_range(_BLOCKS):
        if block % CHUNK == 0:
            keys = ()
            for each in gl.static_range(CHUNK):
                keys = keys + (tile[block + each].permute([1, 0]).load(KEY),)
        before = gl.zeros([heads, slots], gl.float32, MMA) if block < SUMS else sums[0]
        # The oldest sum is first: it is taken from the front and comes back at the end.
        rest = sums if block < SUMS else sums[1:]
        sums = rest + (gl.amd.cdna4.mfma(q[block], keys[block % CHUNK], before),)
    logits = sums[0]
    for each in gl.static_range(1, SUMS):
        logits = logits + sums[each]
    return logits


@gluon.jit
def _rotated_back(x, cos_ptr, sin_ptr):
    """fp32 `x` [heads, 64] times cos - i·sin, 32 each: of a pair (2i, 2i+1) of channels both are in
    one lane."""
    real, imaginary = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    pair = gl.arange(0, real.shape[1], gl.SliceLayout(0, real.type.layout))
    cos, sin = gl.load(cos_ptr + pair)[None, :], gl.load(sin_ptr + pair)[None, :]
    rotated = gl.join(real * cos + imaginary * sin, imaginary * cos - real * sin)
    return gl.convert_layout(gl.reshape(rotated, x.shape), x.type.layout, assert_trivial=True)


@gluon.jit(do_not_specialize=("compressed_count", "splits", "compressed_page", "compressed_shift"))
def _attend(
    q_ptr,
    out_ptr,
    lse_ptr,
    sink_ptr,
    cos_ptr,
    sin_ptr,
    zero_ptr,
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
    sink_scale,
    WINDOW_SHIFT: gl.constexpr,
    BLOCK_H: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SPLIT: gl.constexpr,
    TILES: gl.constexpr,
    AHEAD: gl.constexpr,
    CHUNK: gl.constexpr,
    SUMS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """One split of BLOCK_H heads of one token: the output, or its part and base-2 log-sum-exp when
    SPLIT."""
    WIDE: gl.constexpr = BLOCK_K // WARPS  # bytes a lane fetches of a slot's block
    MMA: gl.constexpr = gl.amd.AMDMFMALayout(
        version=4,
        instr_shape=[16, 16, 32],
        transposed=True,
        warps_per_cta=[BLOCK_H // 16, WARPS * 16 // BLOCK_H],
    )
    LOAD: gl.constexpr = gl.BlockedLayout([1, WIDE], [WIDE, 64 // WIDE], [WARPS, 1], [1, 0])
    WORDS: gl.constexpr = gl.BlockedLayout([1, WIDE // 4], [WIDE, 64 // WIDE], [WARPS, 1], [1, 0])
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [8, 8], [WARPS, 1], [1, 0])
    KEY: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    # When a wave has all slots of its heads, 4 to a lane are the probabilities where the product
    # left them.
    DEPTH: gl.constexpr = 4 if BLOCK_H == 16 * WARPS else 8
    PROBABILITY: gl.constexpr = gl.DotOperandLayout(0, MMA, DEPTH)
    VALUE: gl.constexpr = gl.DotOperandLayout(1, MMA, DEPTH)
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    FIRST: gl.constexpr = gl.BlockedLayout([1], [64], [WARPS], [0])

    token, split = gl.program_id(0).to(gl.int64), gl.program_id(2)
    window_slots_ptr += token * window_count
    compressed_slots_ptr += token * compressed_count
    window_tiles = gl.cdiv(window_count, BLOCK_K)
    first = gl.arange(0, TILES, FIRST) * BLOCK_K
    first = gl.load(compressed_slots_ptr + first, mask=first < compressed_count, other=-1)
    tiles = window_tiles + _uniform(gl.sum((first >= 0).to(gl.int32), 0))
    share = gl.cdiv(tiles, splits)
    start, end = split * share, gl.minimum(split * share + share, tiles)
    if SPLIT:
        if start >= end:
            head = gl.program_id(1) * BLOCK_H + gl.arange(0, BLOCK_H, ROW)
            row = (token * heads + head) * splits + split
            gl.store(
                lse_ptr + row, gl.full([BLOCK_H], float("-inf"), gl.float32, ROW), mask=head < heads
            )
            return

    # Swizzled so that neither 16 slots of one channel block nor 4 whole slots meet in a bank.
    if BLOCK_H == 16 * WARPS:
        TILE: gl.constexpr = gl.PaddedSharedLayout.with_identity_for(
            [[_BLOCK, 8]], [BLOCK_K, _BLOCK], [1, 0]
        )
    else:
        TILE: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 8, [1, 0])
    tile_memory = ()  # a piece a block: the compiler puts a barrier between two stores to one
    for _block in gl.static_range(_BLOCKS):
        tile_memory = tile_memory + (
            gl.allocate_shared_memory(gl.bfloat16, [BLOCK_K, _BLOCK], TILE),
        )
    absent_memory = gl.allocate_shared_memory(
        gl.float32, [BLOCK_K], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    maximum_memory = gl.allocate_shared_memory(
        gl.float32, [BLOCK_H, BLOCK_K // 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    q_head = gl.program_id(1) * BLOCK_H + gl.arange(0, BLOCK_H, gl.SliceLayout(1, QUERY))
    q_row = (
        q_ptr
        + (token * heads + q_head)[:, None] * _DIM
        + gl.arange(0, _BLOCK, gl.SliceLayout(0, QUERY))[None, :]
    )
    q, o = (), ()
    for block in gl.static_range(_BLOCKS):
        part = gl.load(q_row + block * _BLOCK, mask=(q_head < heads)[:, None], other=0.0)
        q = q + (gl.convert_layout(part, gl.DotOperandLayout(0, MMA, 8)),)
        o = o + (gl.zeros([BLOCK_H, _BLOCK], gl.float32, MMA),)
    amax = gl.full([BLOCK_H], _NONE, gl.float32, ROW)
    total = _lane_sums(gl.zeros([BLOCK_H, BLOCK_K], gl.float32, MMA))
    LANE_ROW: gl.constexpr = gl.SliceLayout(1, total.type.layout)

    place = gl.arange(0, BLOCK_K, gl.SliceLayout(1, LOAD))
    channel = gl.arange(0, _BLOCK, gl.SliceLayout(0, LOAD))
    word = gl.arange(0, _BLOCK // 4, gl.SliceLayout(0, WORDS))
    slot = _tile_slots(
        start,
        end,
        window_tiles,
        window_slots_ptr,
        compressed_slots_ptr,
        window_count,
        compressed_count,
        place,
    )
    if AHEAD:
        got = _tile_bytes(
            start,
            slot,
            window_tiles,
            window_ptr,
            compressed_ptr,
            zero_ptr,
            window_page_bytes,
            compressed_page_bytes,
            word,
            channel,
            compressed_page,
            compressed_shift,
            WINDOW_SHIFT,
        )
        slot = _tile_slots(
            start + 1,
            end,
            window_tiles,
            window_slots_ptr,
            compressed_slots_ptr,
            window_count,
            compressed_count,
            place,
        )
    for tile in range(start, end):
        if not AHEAD:
            got = _tile_bytes(
                tile,
                slot,
                window_tiles,
                window_ptr,
                compressed_ptr,
                zero_ptr,
                window_page_bytes,
                compressed_page_bytes,
                word,
                channel,
                compressed_page,
                compressed_shift,
                WINDOW_SHIFT,
            )
            slot = _tile_slots(
                tile + 1,
                end,
                window_tiles,
                window_slots_ptr,
                compressed_slots_ptr,
                window_count,
                compressed_count,
                place,
            )
        for block in gl.static_range(_NOPE_BLOCKS):
            tile_memory[block].store(_dequantised(got[block], got[_NOPE_BLOCKS + 1], block, LOAD))
        tile_memory[_NOPE_BLOCKS].store(got[_NOPE_BLOCKS])
        absent_memory.store(got[_NOPE_BLOCKS + 2])
        if AHEAD:
            got = _tile_bytes(
                tile + 1,
                slot,
                window_tiles,
                window_ptr,
                compressed_ptr,
                zero_ptr,
                window_page_bytes,
                compressed_page_bytes,
                word,
                channel,
                compressed_page,
                compressed_shift,
                WINDOW_SHIFT,
            )
            slot = _tile_slots(
                tile + 2,
                end,
                window_tiles,
                window_slots_ptr,
                compressed_slots_ptr,
                window_count,
                compressed_count,
                place,
            )
        logits = _logits(q, tile_memory, CHUNK, SUMS, MMA, KEY) * scale_log2
        logits = logits + absent_memory.load(gl.SliceLayout(0, MMA))[None, :]
        new_amax = gl.maximum(amax, _row_maximum(logits, maximum_memory, MMA))
        p = gl.exp2(logits - new_amax[:, None])
        decay = gl.exp2(amax - new_amax)
        total = total * gl.convert_layout(decay, LANE_ROW, assert_trivial=True)[
            :, None
        ] + _lane_sums(p)
        p = gl.convert_layout(p.to(gl.bfloat16), PROBABILITY)
        updated = ()
        for block in gl.static_range(_BLOCKS):
            value = tile_memory[block].load(VALUE)
            updated = updated + (gl.amd.cdna4.mfma(p, value, o[block] * decay[:, None]),)
        o, amax = updated, new_amax

    denominator = gl.convert_layout(gl.sum(total, 1), ROW, assert_trivial=True)
    head = gl.program_id(1) * BLOCK_H + gl.arange(0, BLOCK_H, ROW)
    row = (token * heads + head) * splits + split
    if SPLIT:
        some = gl.where(denominator > 0, denominator, 1.0)
        gl.store(
            lse_ptr + row,
            gl.where(denominator > 0, amax + gl.log2(some), float("-inf")),
            mask=head < heads,
        )
        part = 1.0 / some
    else:
        at = token * (_BLOCK // 2)
        o = o[:_NOPE_BLOCKS] + (_rotated_back(o[_NOPE_BLOCKS], cos_ptr + at, sin_ptr + at),)
        sink = gl.load(sink_ptr + head, mask=head < heads, other=0.0) * sink_scale
        highest = gl.maximum(amax, sink)
        weight = gl.exp2(amax - highest)
        part = weight / (denominator * weight + gl.exp2(sink - highest))
    out_row = out_ptr + row[:, None] * _DIM + gl.arange(0, _BLOCK, gl.SliceLayout(0, MMA))[None, :]
    for block in gl.static_range(_BLOCKS):
        gl.store(
            out_row + block * _BLOCK,
            (o[block] * part[:, None]).to(out_ptr.dtype.element_ty),
            mask=(head < heads)[:, None],
        )


_zero_pages: dict[tuple[torch.device, int], Tensor] = {}


def _zero_page(device: torch.device, size: int) -> Tensor:
    """A page of zeros, which absent slots are read from. It is kept, except while a graph is
    captured, whose memory other work must not read."""
    if (device, size) in _zero_pages:
        return _zero_pages[device, size]
    page = torch.zeros(size, dtype=torch.uint8, device=device)
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _zero_pages[device, size] = page
    return page


def sparse_mla(q: Tensor, *rest: Any) -> Tensor:
    """The operator of the same name on gfx950, with at least one column of `window`; see
    `kernels/triton/sparse_mla.py`, `launch`."""
    tile = next((tile for tile in _TILES if q.shape[1] <= tile.heads), _TILES[-1])
    constants = {
        "sink_scale": LOG2_E,
        "AHEAD": tile.ahead,
        "CHUNK": tile.chunk,
        "SUMS": tile.sums,
        "WARPS": _WARPS,
        "num_warps": _WARPS,
    }
    return launch(Walk(_attend, tile.heads, tile.slots, 2, constants, _zero_page), q, *rest)
