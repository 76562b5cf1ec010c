"""The two products of an expert, for moe and shared_expert: blocks of rows of one expert times its
matrices, as released.

`gate_up_kernel` is w1 and w3 in one pass, clamp, SiLU, product and routing weight; `down_kernel` is
w2. What is multiplied follows from how the weights lie and from the chip:

* e2m1 by e4m3 with scales of 32, one instruction of gfx950; elsewhere e2m1 becomes bf16, which is
  exact, and meets the bf16 activations.
* e4m3 by e4m3, sums of 128 times both scales. Without FP8 products e4m3 becomes bf16 too.
* bf16 by bf16.

Variants: widths and form of weights, routed or not, tile.

Rows are independent and sums go through the inner dimension in one order, by one instruction: a row
has the same bits in any block, whatever shares it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formats import (
    INTERPRETED,
    fp8_scale,
    fp8_to_fp32,
    round_to_bf16,
    to_bf16,
    to_fp8_bytes,
)

_SCALED = tl.constexpr(32)  # inputs of an e2m1 scale
_BLOCK = tl.constexpr(128)  # inputs of a scale of e4m3, and outputs of a weight's
_NAN = tl.constexpr(0x7F)  # e4m3's, and as a scale 255


@triton.jit
def quantise(x):
    """(e4m3 bytes, ue8m0 byte) of fp32 `x` [n, 128], a scale a row; a row with a value that is not
    finite becomes NaN."""
    wrong = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1)
    _, inverse, byte = fp8_scale(tl.max(tl.abs(x), 1))
    codes = to_fp8_bytes(tl.where(wrong[:, None] > 0, 0.0, x * inverse[:, None]))
    codes = tl.where(wrong[:, None] > 0, _NAN, codes).to(tl.uint8)
    return codes, tl.where(wrong > 0, 255, byte.to(tl.int32)).to(tl.uint8)


@triton.jit
def quantise_rows_kernel(x, codes, scales, HIDDEN: tl.constexpr, GROUPS: tl.constexpr):
    """Grid (T, ceil(HIDDEN / 128 / GROUPS)): e4m3 of `x` in blocks of 128 and their ue8m0 bytes."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = group < HIDDEN // _BLOCK
    at = row * HIDDEN + group[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    values = tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)
    found, scale = quantise(values)
    tl.store(codes + at, found, mask=inside[:, None])
    tl.store(scales + row * (HIDDEN // _BLOCK) + group, scale, mask=inside)


@triton.jit
def _ue8m0(byte):
    """fp32 of a ue8m0 byte: 2^(byte - 127), NaN for 255."""
    bits = byte.to(tl.int32)
    scale = tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)
    return tl.where(bits == 255, float("nan"), scale)


@triton.jit
def _block_scale(scales, at, mask, BYTES: tl.constexpr):
    """fp32 of the scales of e4m3 weights at `at`, stored as ue8m0 bytes or as fp32."""
    found = tl.load(scales + at, mask=mask, other=0)
    if BYTES:
        return _ue8m0(found)
    else:
        return found


@triton.jit
def _e4m3(byte, FNUZ: tl.constexpr):
    """Operand of e4m3 `byte`; with FNUZ in gfx942's format, where the byte means half of the value
    and that of -0 is NaN."""
    if FNUZ:
        return tl.where(byte == 0x80, 0, byte).to(tl.uint8).to(tl.float8e4b8, bitcast=True)
    else:
        return byte.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _bf16_product(x, weight, total):
    """total + x · weight of bf16 values; the interpreter multiplies them as fp32."""
    if INTERPRETED:
        product = tl.dot(x.to(tl.float32), weight.to(tl.float32), input_precision="ieee")
        return total + product
    else:
        return tl.dot(x, weight, total)


@triton.jit
def _times(
    total,
    x,
    x_scale,
    weights,
    scales,
    column,
    inside,
    k,
    IN: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    FNUZ: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """total + x · Wᵀ over inputs k .. k + BLOCK_K - 1 of the matrix at `weights`, for its rows
    `column`, of which those `inside` exist; `x` [n, BLOCK_K] is e4m3 with `x_scale` if ROUNDED."""
    if WEIGHTS == "fp4":
        byte, group = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // _SCALED)
        at = column[None, :] * (IN // 2) + (byte + k // 2)[:, None]
        scale_at = column[:, None] * (IN // _SCALED) + (group + k // _SCALED)[None, :]
        if EVEN:
            codes, scale = tl.load(weights + at), tl.load(scales + scale_at)
        else:
            there = inside[None, :] & (byte + k // 2 < IN // 2)[:, None]
            codes = tl.load(weights + at, mask=there, other=0)
            there = inside[:, None] & (group + k // _SCALED < IN // _SCALED)[None, :]
            scale = tl.load(scales + scale_at, mask=there, other=0)
        if ROUNDED:
            total = tl.dot_scaled(x, x_scale, "e4m3", codes, scale, "e2m1", total)
        else:
            total = tl.dot_scaled(x, None, "bf16", codes, scale, "e2m1", total, fast_math=True)
    else:
        channel = tl.arange(0, BLOCK_K) + k
        at = column[None, :] * IN + channel[:, None]
        if EVEN:
            tile = tl.load(weights + at)
        else:
            tile = tl.load(weights + at, mask=inside[None, :] & (channel < IN)[:, None], other=0)
        if WEIGHTS == "bf16":
            total = _bf16_product(x, tile, total)
        else:
            scale_at = column // _BLOCK * ((IN + _BLOCK - 1) // _BLOCK) + k // _BLOCK
            scale = _block_scale(scales, scale_at, inside, SCALE_BYTES)
            nothing = tl.zeros(total.shape, tl.float32)
            if ROUNDED:
                product = tl.dot(_e4m3(x, FNUZ), _e4m3(tile, FNUZ), nothing)
                scale *= 4.0 if FNUZ else 1.0
                total += product * (x_scale[:, None] * scale[None, :])
            else:
                tile = to_bf16(fp8_to_fp32(tile))
                total += _bf16_product(x, tile, nothing) * scale[None, :]
    return total


@triton.jit
def _rows_of_block(pairs, owners, rows, BLOCK_M: tl.constexpr, GROUPED: tl.constexpr):
    """(expert, pair of each row of this program's block, which rows have one); expert -1 when
    there is no block."""
    lane = tl.arange(0, BLOCK_M)
    slot = tl.program_id(0)
    if GROUPED:
        expert = tl.load(owners + slot)
        pair = tl.load(pairs + slot * BLOCK_M + lane)
        return expert, tl.maximum(pair, 0).to(tl.int64), pair >= 0
    else:
        pair = slot * BLOCK_M + lane
        return slot * 0, pair.to(tl.int64), pair < rows


# Weights of the routing are read one at a time: how they are aligned changes no load.
@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("routing",))
def gate_up_kernel(
    x,
    x_scales,
    w1,
    w1_scales,
    w3,
    w3_scales,
    pairs,
    owners,
    routing,
    hidden,
    hidden_scales,
    rows,
    swiglu_limit,
    matrix_size,
    scale_size,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TOPK: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROUNDED: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    FNUZ: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks, ceil(OUT / BLOCK_N)): `hidden` [pairs, OUT] of rows `x` [T, IN]; e4m3 with
    scales when ROUNDED and a program has whole blocks of 128 outputs, else bf16."""
    expert, pair, real = _rows_of_block(pairs, owners, rows, BLOCK_M, GROUPED)
    if expert < 0:
        return
    token = pair // TOPK
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < OUT
    here = expert.to(tl.int64)
    w1, w3 = w1 + here * matrix_size, w3 + here * matrix_size
    if WEIGHTS != "bf16":
        w1_scales, w3_scales = w1_scales + here * scale_size, w3_scales + here * scale_size
    even: tl.constexpr = OUT % BLOCK_N == 0 and IN % BLOCK_K == 0
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, IN, BLOCK_K):
        channel = tl.arange(0, BLOCK_K) + k
        there = real[:, None] & (channel < IN)[None, :] if not even else real[:, None]
        tile = tl.load(x + token[:, None] * IN + channel[None, :], mask=there, other=0)
        scale = _activation_scale(x_scales, token, real, k, IN, WEIGHTS, ROUNDED, BLOCK_K)
        gate = _times(
            gate, tile, scale, w1, w1_scales, column, inside, k,
            IN, WEIGHTS, ROUNDED, SCALE_BYTES, FNUZ, even, BLOCK_K,
        )  # fmt: skip
        up = _times(
            up, tile, scale, w3, w3_scales, column, inside, k,
            IN, WEIGHTS, ROUNDED, SCALE_BYTES, FNUZ, even, BLOCK_K,
        )  # fmt: skip
    # Comparisons keep NaN, which a maximum would drop.
    gate = tl.where(gate > swiglu_limit, swiglu_limit, gate)
    up = tl.where(up > swiglu_limit, swiglu_limit, tl.where(up < -swiglu_limit, -swiglu_limit, up))
    value = gate / (1.0 + tl.exp(-gate)) * up
    if GROUPED:
        value *= tl.load(routing + pair, mask=real, other=0.0)[:, None]
    at = pair[:, None] * OUT + column[None, :]
    if ROUNDED and BLOCK_N % 128 == 0:
        value = tl.where(inside[None, :], round_to_bf16(value), 0.0)
        codes, found = quantise(tl.reshape(value, (BLOCK_M * BLOCK_N // _BLOCK, _BLOCK)))
        tl.store(
            hidden + at, tl.reshape(codes, (BLOCK_M, BLOCK_N)), mask=real[:, None] & inside[None, :]
        )
        groups: tl.constexpr = (OUT + _BLOCK - 1) // _BLOCK
        group = tl.program_id(1) * (BLOCK_N // _BLOCK) + tl.arange(0, BLOCK_N // _BLOCK)
        tl.store(
            hidden_scales + pair[:, None] * groups + group[None, :],
            tl.reshape(found, (BLOCK_M, BLOCK_N // _BLOCK)),
            mask=real[:, None] & (group < groups)[None, :],
        )
    else:
        tl.store(hidden + at, to_bf16(value), mask=real[:, None] & inside[None, :])


@triton.jit
def _activation_scale(
    scales,
    row,
    real,
    k,
    IN: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scales of rows at inputs k .. k + BLOCK_K - 1: ue8m0 bytes, one a 32 inputs, for e2m1; fp32
    for e4m3; 1 for bf16 rows."""
    groups: tl.constexpr = (IN + _BLOCK - 1) // _BLOCK
    if not ROUNDED:
        return 1.0
    elif WEIGHTS == "fp4":
        group = (tl.arange(0, BLOCK_K // _SCALED) + k // _SCALED) // (_BLOCK // _SCALED)
        mask = real[:, None] & (group < groups)[None, :]
        return tl.load(scales + row[:, None] * groups + group[None, :], mask=mask, other=0)
    else:
        return _ue8m0(tl.load(scales + row * groups + k // _BLOCK, mask=real, other=0))


@triton.jit
def _rounded_tile(tile, WEIGHTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """e4m3 and scales of a bf16 tile [BLOCK_M, 128], as _activation_scale gives them."""
    codes, scale = quantise(tile.to(tl.float32))
    if WEIGHTS == "fp4":
        return codes, tl.broadcast_to(scale[:, None], (BLOCK_M, _BLOCK // _SCALED))
    else:
        return codes, _ue8m0(scale)


@triton.jit(do_not_specialize=("rows",))
def down_kernel(
    hidden,
    hidden_scales,
    w2,
    w2_scales,
    pairs,
    owners,
    out,
    rows,
    matrix_size,
    scale_size,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROUND_HERE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    FNUZ: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (blocks, ceil(OUT / BLOCK_N)): `out` [pairs, OUT] of `hidden` [pairs, IN]; a bf16
    `hidden` is rounded to e4m3 on the way if ROUND_HERE. `out` is bf16 for moe, else fp32."""
    expert, pair, real = _rows_of_block(pairs, owners, rows, BLOCK_M, GROUPED)
    if expert < 0:
        return
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < OUT
    here = expert.to(tl.int64)
    w2 += here * matrix_size
    if WEIGHTS != "bf16":
        w2_scales += here * scale_size
    even: tl.constexpr = OUT % BLOCK_N == 0 and IN % BLOCK_K == 0
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, IN, BLOCK_K):
        channel = tl.arange(0, BLOCK_K) + k
        there = real[:, None] & (channel < IN)[None, :] if not even else real[:, None]
        tile = tl.load(hidden + pair[:, None] * IN + channel[None, :], mask=there, other=0)
        if ROUND_HERE:
            tile, scale = _rounded_tile(tile, WEIGHTS, BLOCK_M)
        else:
            scale = _activation_scale(hidden_scales, pair, real, k, IN, WEIGHTS, ROUNDED, BLOCK_K)
        total = _times(
            total, tile, scale, w2, w2_scales, column, inside, k,
            IN, WEIGHTS, ROUNDED, SCALE_BYTES, FNUZ, even, BLOCK_K,
        )  # fmt: skip
    at = pair[:, None] * OUT + column[None, :]
    mask = real[:, None] & inside[None, :]
    tl.store(out + at, to_bf16(total) if GROUPED else total, mask=mask)


@triton.jit(do_not_specialize=("first",))
def sum_kernel(
    parts,
    chosen,
    out,
    first,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T, ceil(WIDTH / BLOCK)): fp32 sum of a token's parts in the order of its choices;
    experts of other processes have none."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOPK):
        pair = token * TOPK + choice
        expert = tl.load(chosen + pair) - first
        held = inside & (expert >= 0) & (expert < EXPERTS)
        total += tl.load(parts + pair * WIDTH + column, mask=held, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total, mask=inside)
