"""Attention over packed latents by slot lists in TileLang: the readable form (docs/kernels.md).

`attend` takes a tile of heads of one token and every `splits`-th tile of its slots. A tile of
latents is dequantised into local memory once and is key and value of two T.gemm; the softmax runs
in base 2. A split leaves its sum of e^(logit - max) times latents, the maximum and the sum of the
weights; `combine` joins the splits of a head with the sink, rotates the last 64 channels back and
rounds once. The number of splits follows from shapes, so a captured graph keeps it; tiles are dealt
out in turn, so that a short list is shared by all splits too. Offsets into a pool are 64-bit.

Byte floor as in Triton; the parts are 2·2056 bytes more for every head, token and split.

Variants: heads.
"""

# No `annotations` from the future: TileLang reads those of the kernels as they are.
from typing import Any, NamedTuple

import tilelang.language as T
import torch
from torch import Tensor

from ...cache.layout import (
    LATENT_DATA_BYTES,
    LATENT_DIM,
    LATENT_SCALE_BYTES,
    NOPE_DIM,
    ROPE_DIM,
    SCALE_BLOCK,
)
from ...cache.stores import PackedLatentCache
from ..strides import require_contiguous
from ..triton.sparse_mla import LOG2_E, compute_units, split_count
from .build import Kernel

_HEADS, _SLOTS = 16, 32
_THREADS = 128
"""Two waves: each has 16 slots of a tile for the logits, and half of the channels for the sums."""
_PROGRAMS_A_UNIT = 3
_NONE = -1e30
"""Below every logit, and finite, so that differences of it are."""
_PAIRS = ROPE_DIM // 2
_BLOCKS = NOPE_DIM // SCALE_BLOCK
_PIECE = SCALE_BLOCK // 4
"""Channels of a block that one of the four threads of a slot fetches: one load of 16 bytes."""
_LINE = 64
_LINES = LATENT_DATA_BYTES // _LINE
"""Offsets come in lines of 64 bytes, so that TileLang knows wide loads to be aligned."""


class _List(NamedTuple):
    """A list of slots, and the pages they are in. Numbers come as one object: TileLang gives a
    macro's parameters to what is passed as names."""

    columns: Any
    slots_per_page: Any
    lines_per_page: Any


@T.macro
def _fetch(token, first, sizes, slots, codes, scales, ropes, slot, latent, code, power, rope):
    """Puts the latents of the tile from column `first` on into `latent`, and their slots into
    `slot`. Four threads share a slot.

    An absent one is zeros: a NaN in memory that nobody owns, times a weight of 0, would be a NaN.
    """
    thread = T.get_thread_binding()
    row, quarter = thread // 4, thread % 4
    mine = T.alloc_var("int64", init=T.int64(-1))
    if first + row < sizes.columns:
        mine = slots[token, first + row]
    if quarter == 0:
        slot[row] = mine
    page = T.max(mine, 0) // sizes.slots_per_page * sizes.lines_per_page
    place = T.max(mine, 0) % sizes.slots_per_page
    line = page + place * _LINES
    scale = (page + sizes.slots_per_page * _LINES) * _LINE + place * LATENT_SCALE_BYTES
    for block in T.unroll(_BLOCKS):
        power[block] = 0
        for j in T.vectorized(_PIECE):
            code[block, j] = 0
    for j in T.vectorized(_PIECE):
        rope[j] = 0
    if mine >= 0:
        for block in T.unroll(_BLOCKS):
            power[block] = T.reinterpret(
                T.cast(scales[scale + block], "uint32") << T.uint32(23), "float32"
            )
            for j in T.vectorized(_PIECE):
                code[block, j] = codes[line * _LINE + block * SCALE_BLOCK + quarter * _PIECE + j]
        for j in T.vectorized(_PIECE):
            rope[j] = ropes[line * (_LINE // 2) + NOPE_DIM // 2 + quarter * _PIECE + j]
    for j in T.vectorized(_PIECE):
        latent[row, NOPE_DIM + quarter * _PIECE + j] = rope[j]
    for block in T.unroll(_BLOCKS):
        for j in T.unroll(_PIECE):
            rope[j] = T.cast(T.cast(code[block, j], "float32") * power[block], "bfloat16")
        for j in T.vectorized(_PIECE):
            latent[row, block * SCALE_BLOCK + quarter * _PIECE + j] = rope[j]


def sparse_mla_attend_kernel(heads: int):
    tokens, splits = T.dynamic("tokens"), T.dynamic("splits")
    window_columns, compressed_columns = T.dynamic("columns"), T.dynamic("entries")
    window_bytes, window_halves = T.dynamic("bytes", "int64"), T.dynamic("halves", "int64")
    compressed_bytes = T.dynamic("entry_bytes", "int64")
    compressed_halves = T.dynamic("entry_halves", "int64")

    @T.prim_func
    def sparse_mla_attend(
        q: T.Tensor((tokens, heads, LATENT_DIM), "bfloat16"),
        window_codes: T.Tensor((window_bytes,), "float8_e4m3fn"),
        window_scales: T.Tensor((window_bytes,), "uint8"),
        window_ropes: T.Tensor((window_halves,), "bfloat16"),
        window: T.Tensor((tokens, window_columns), "int64"),
        compressed_codes: T.Tensor((compressed_bytes,), "float8_e4m3fn"),
        compressed_scales: T.Tensor((compressed_bytes,), "uint8"),
        compressed_ropes: T.Tensor((compressed_halves,), "bfloat16"),
        compressed: T.Tensor((tokens, compressed_columns), "int64"),
        part: T.Tensor((tokens, heads, splits, LATENT_DIM), "float32"),
        state: T.Tensor((tokens, heads, splits, 2), "float32"),
        window_slots: T.int32,
        window_lines: T.int32,
        compressed_slots: T.int32,
        compressed_lines: T.int32,
        scale_log2: T.float32,
    ):
        with T.Kernel(splits, T.ceildiv(heads, _HEADS), tokens, threads=_THREADS) as (
            split,
            block,
            token,
        ):
            query = T.alloc_shared((_HEADS, LATENT_DIM), "bfloat16")
            latent = T.alloc_shared((_SLOTS, LATENT_DIM), "bfloat16")
            weight = T.alloc_shared((_HEADS, _SLOTS), "bfloat16")
            slot = T.alloc_shared((_SLOTS,), "int64")
            code = T.alloc_local((_BLOCKS, _PIECE), "float8_e4m3fn")
            power = T.alloc_local((_BLOCKS,), "float32")
            rope = T.alloc_local((_PIECE,), "bfloat16")
            logit = T.alloc_fragment((_HEADS, _SLOTS), "float32")
            out = T.alloc_fragment((_HEADS, LATENT_DIM), "float32")
            amax = T.alloc_fragment((_HEADS,), "float32")
            before = T.alloc_fragment((_HEADS,), "float32")
            decay = T.alloc_fragment((_HEADS,), "float32")
            added = T.alloc_fragment((_HEADS,), "float32")
            total = T.alloc_fragment((_HEADS,), "float32")
            for h, c in T.Parallel(_HEADS, LATENT_DIM):
                query[h, c] = q[token, T.min(block * _HEADS + h, heads - 1), c]
            T.clear(out)
            T.clear(total)
            T.fill(amax, _NONE)
            window_tiles = T.ceildiv(window_columns, _SLOTS)
            tiles = window_tiles + T.ceildiv(compressed_columns, _SLOTS)
            for turn in T.serial(T.ceildiv(tiles - split, splits)):
                tile = turn * splits + split
                entry = (tile - window_tiles) * _SLOTS
                # of the compressed list, what is absent comes last
                if T.if_then_else(tile < window_tiles, T.int64(0), compressed[token, entry]) >= 0:
                    if tile < window_tiles:
                        _fetch(
                            *(token, tile * _SLOTS),
                            _List(window_columns, window_slots, window_lines),
                            *(window, window_codes, window_scales, window_ropes),
                            *(slot, latent, code, power, rope),
                        )
                    else:
                        _fetch(
                            *(token, entry),
                            _List(compressed_columns, compressed_slots, compressed_lines),
                            *(compressed, compressed_codes, compressed_scales, compressed_ropes),
                            *(slot, latent, code, power, rope),
                        )
                    T.sync_threads()
                    T.gemm(
                        query,
                        latent,
                        logit,
                        transpose_B=True,
                        clear_accum=True,
                        policy=T.GemmWarpPolicy.FullCol,
                        k_pack=2,
                    )
                    for h, i in T.Parallel(_HEADS, _SLOTS):
                        logit[h, i] = T.if_then_else(slot[i] >= 0, logit[h, i] * scale_log2, _NONE)
                    T.copy(amax, before)
                    T.reduce_max(logit, amax, dim=1, clear=False)
                    for h in T.Parallel(_HEADS):
                        decay[h] = T.exp2(before[h] - amax[h])
                    for h, i in T.Parallel(_HEADS, _SLOTS):
                        logit[h, i] = T.if_then_else(
                            slot[i] >= 0, T.exp2(logit[h, i] - amax[h]), 0.0
                        )
                    T.reduce_sum(logit, added, dim=1)
                    for h in T.Parallel(_HEADS):
                        total[h] = total[h] * decay[h] + added[h]
                    T.copy(logit, weight)
                    for h, c in T.Parallel(_HEADS, LATENT_DIM):
                        out[h, c] *= decay[h]
                    T.gemm(weight, latent, out, policy=T.GemmWarpPolicy.FullCol, k_pack=2)
            for h, c in T.Parallel(_HEADS, LATENT_DIM):
                if block * _HEADS + h < heads:
                    part[token, block * _HEADS + h, split, c] = out[h, c]
            for h in T.Parallel(_HEADS):
                if block * _HEADS + h < heads:
                    state[token, block * _HEADS + h, split, 0] = amax[h]
                    state[token, block * _HEADS + h, split, 1] = total[h]

    return sparse_mla_attend


def sparse_mla_combine_kernel(heads: int):
    tokens, splits = T.dynamic("tokens"), T.dynamic("splits")

    @T.prim_func
    def sparse_mla_combine(
        part: T.Tensor((tokens, heads, splits, LATENT_DIM), "float32"),
        state: T.Tensor((tokens, heads, splits, 2), "float32"),
        sink: T.Tensor((heads,), "float32"),
        cos: T.Tensor((tokens, _PAIRS), "float32"),
        sin: T.Tensor((tokens, _PAIRS), "float32"),
        out: T.Tensor((tokens, heads, LATENT_DIM), "bfloat16"),
    ):
        with T.Kernel(heads, tokens, threads=_THREADS) as (head, token):
            o = T.alloc_shared((LATENT_DIM,), "float32")
            total = T.alloc_fragment((LATENT_DIM,), "float32")
            sink_log2 = sink[head] * LOG2_E
            highest = T.alloc_var("float32", init=sink_log2)
            for split in T.serial(splits):
                highest = T.max(highest, state[token, head, split, 0])
            denominator = T.alloc_var("float32", init=T.exp2(sink_log2 - highest))
            T.clear(total)
            for split in T.serial(splits):
                factor = T.exp2(state[token, head, split, 0] - highest)
                denominator = denominator + state[token, head, split, 1] * factor
                for c in T.Parallel(LATENT_DIM):
                    total[c] += part[token, head, split, c] * factor
            for c in T.Parallel(LATENT_DIM):
                o[c] = total[c] / denominator
            T.sync_threads()
            for c in T.Parallel(NOPE_DIM):
                out[token, head, c] = T.cast(o[c], "bfloat16")
            for pair in T.Parallel(_PAIRS):
                x, y = o[NOPE_DIM + 2 * pair], o[NOPE_DIM + 2 * pair + 1]
                a, b = cos[token, pair], sin[token, pair]
                out[token, head, NOPE_DIM + 2 * pair] = T.cast(x * a + y * b, "bfloat16")
                out[token, head, NOPE_DIM + 2 * pair + 1] = T.cast(y * a - x * b, "bfloat16")

    return sparse_mla_combine


ATTEND = Kernel(sparse_mla_attend_kernel, checked=False)
COMBINE = Kernel(sparse_mla_combine_kernel, checked=False)


def _views(cache: PackedLatentCache) -> tuple[Tensor, Tensor, Tensor]:
    """The pages as e4m3 codes, as bytes and as bf16, each in one dimension."""
    pages = cache.pages.view(-1)
    return pages.view(torch.float8_e4m3fn), pages, pages.view(torch.bfloat16)


def sparse_mla(
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
    """The operator of the same name for bf16 `q` and packed caches, with at least one column of
    `window`. All tensors are contiguous; ValueError names one that is not."""
    tokens, heads, _ = q.shape
    out = torch.empty_like(q)
    if tokens == 0:
        return out
    if compressed is None:
        compressed_cache, compressed = window_cache, window.new_empty(tokens, 0)
    require_contiguous(
        "sparse_mla",
        q=q,
        window_pages=window_cache.pages,
        window=window,
        compressed_pages=compressed_cache.pages,
        compressed=compressed,
        sink=sink,
        cos=cos,
        sin=sin,
    )
    blocks = -(-heads // _HEADS)
    tiles = -(-window.shape[1] // _SLOTS) + -(-compressed.shape[1] // _SLOTS)
    splits = split_count(tokens, heads, blocks, tiles, compute_units(q) * _PROGRAMS_A_UNIT)
    part = q.new_empty(tokens, heads, splits, LATENT_DIM, dtype=torch.float32)
    state = q.new_empty(tokens, heads, splits, 2, dtype=torch.float32)
    ATTEND(
        q,
        *_views(window_cache),
        window,
        *_views(compressed_cache),
        compressed,
        part,
        state,
        window_cache.slots_per_page,
        window_cache.pages.shape[1] // _LINE,
        compressed_cache.slots_per_page,
        compressed_cache.pages.shape[1] // _LINE,
        softmax_scale * LOG2_E,
        heads=heads,
    )
    COMBINE(part, state, sink, cos, sin, out, heads=heads)
    return out
