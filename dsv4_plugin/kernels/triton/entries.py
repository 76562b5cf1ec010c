"""The last steps of every cached vector, as device functions: RMSNorm, RoPE, quantisation and the
paged store.

A vector of D channels is a tile of 8 rows: for latents (512) a row is one FP8 block of 64 and the
last row is the RoPE part; for index keys (128) the last four rows are. A negative slot is not
stored.
"""

import triton
import triton.language as tl

from ...cache import layout
from .formats import fp8_scale, round_to_bf16, to_bf16, to_fp8_bytes

_NOPE_DIM = tl.constexpr(layout.NOPE_DIM)
_ROPE_DIM = tl.constexpr(layout.ROPE_DIM)
_BLOCK = tl.constexpr(layout.SCALE_BLOCK)
_DATA_BYTES = tl.constexpr(layout.LATENT_DATA_BYTES)
_SCALE_BYTES = tl.constexpr(layout.LATENT_SCALE_BYTES)
_INDEX_DIM = tl.constexpr(layout.INDEX_DIM)
_INDEX_ENTRIES = tl.constexpr(layout.INDEX_PAGE_ENTRIES)


@triton.jit
def rotate(x, cos, sin):
    """Pairs (2i, 2i+1) of the last dimension of fp32 `x` [n, 2p] times cos + i·sin, [n or 1, p]
    each."""
    real, imaginary = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    rotated = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    return tl.reshape(rotated, (x.shape[0], x.shape[1]))


@triton.jit
def load_rotation(cos, sin, row, pair, DIM: tl.constexpr):
    """(cos, sin) of the channel pairs `pair` of a vector of DIM channels, of which the last 64
    turn."""
    rope_pair = pair - (DIM - _ROPE_DIM) // 2
    at = row * (_ROPE_DIM // 2) + rope_pair
    return tl.load(cos + at, mask=rope_pair >= 0, other=1.0), tl.load(
        sin + at, mask=rope_pair >= 0, other=0.0
    )


@triton.jit
def norm_and_rotate(x, weight, eps, cos, sin, row, DIM: tl.constexpr):
    """Normed and rotated tile fp32 [8, DIM/8] of `x`, rounded to bf16 after each; `row` is that of
    `cos` and `sin`."""
    columns: tl.constexpr = DIM // 8
    line = tl.arange(0, 8)[:, None]
    scale = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / DIM + eps)
    x = round_to_bf16(
        x * scale * tl.load(weight + line * columns + tl.arange(0, columns)[None, :]).to(tl.float32)
    )
    pair = line * (columns // 2) + tl.arange(0, columns // 2)[None, :]
    cosines, sines = load_rotation(cos, sin, row, pair, DIM)
    return round_to_bf16(rotate(x, cosines, sines))


@triton.jit
def store_latent(x, slot, pages, rope_pages, page_bytes, SLOTS: tl.constexpr):
    """Stores tile `x` fp32 [8, 64] at `slot` (int64) of a latent cache; `rope_pages` are its
    `pages` as bf16."""
    line, column = tl.arange(0, 8), tl.arange(0, 64)[None, :]
    _, inverse, byte = fp8_scale(tl.max(tl.abs(x), 1))
    page, within = slot // SLOTS, slot % SLOTS
    data = page * page_bytes + within * _DATA_BYTES
    is_nope = (line < _NOPE_DIM // _BLOCK) & (slot >= 0)
    is_rope = (line == _NOPE_DIM // _BLOCK) & (slot >= 0)
    tl.store(
        pages + data + line[:, None] * _BLOCK + column,
        to_fp8_bytes(x * inverse[:, None]),
        mask=is_nope[:, None],
    )
    tl.store(
        rope_pages + (data + _NOPE_DIM) // 2 + column + line[:, None] * 0,
        to_bf16(x),
        mask=is_rope[:, None],
    )
    scales = page * page_bytes + SLOTS * _DATA_BYTES + within * _SCALE_BYTES
    tl.store(pages + scales + line, byte, mask=is_nope)


@triton.jit
def hadamard_sign(i, j):
    """Sylvester's sign of row `i` and column `j`, below 128: -1 to the number of bits that both
    have."""
    common = i & j
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    common = common ^ (common >> 1)
    return (1 - 2 * (common & 1)).to(tl.float32)


@triton.jit
def _hadamard_tile(x):
    """Walsh-Hadamard transform of the 128 channels of tile `x` [8, 16]: 16 points along the rows,
    then 8 across."""
    short, long = tl.arange(0, 8), tl.arange(0, 16)
    x = tl.sum(x[:, :, None] * hadamard_sign(long[:, None], long[None, :])[None, :, :], 1)
    return (
        tl.sum(hadamard_sign(short[:, None], short[None, :])[:, :, None] * x[:, None, :], 0)
        * 0.08838834764831845
    )


@triton.jit
def store_index_key(x, slot, pages, scale_pages, page_bytes):
    """Rotates tile `x` fp32 [8, 16] by Hadamard's matrix and stores it at `slot` (int64) of an
    index cache.

    `scale_pages` are its `pages` as fp32.
    """
    x = _hadamard_tile(x)
    scale, inverse, _ = fp8_scale(tl.max(tl.max(tl.abs(x), 1), 0))
    page, within = slot // _INDEX_ENTRIES, slot % _INDEX_ENTRIES
    channel = tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :]
    keys = page * page_bytes + within * _INDEX_DIM
    tl.store(pages + keys + channel, to_fp8_bytes(x * inverse), mask=slot >= 0)
    tl.store(
        scale_pages + (page * page_bytes + _INDEX_ENTRIES * _INDEX_DIM) // 4 + within,
        scale,
        mask=slot >= 0,
    )
