"""Both products of an expert for a block of 16 rows: FP4 weights, in the order of prepared.py, by
FP8 activations, on the scaled matrix instruction of gfx950.

A wave makes 64 rows of a weight by the block's 16 rows. Weights are operand A, so that a lane ends
with four consecutive results of one row. Both operands come straight from memory into registers, a
ring of four steps of 128 channels ahead: 19 KiB of a wave are on their way, 76 of a workgroup. The
ring is refilled in place, and fences keep its loads in one order, before the loop and in it; else
the compiler copies registers that are being loaded, or waits for all of them.

Byte floor of a block: 0.53 bytes a weight, 1.01 an input of each row, what it writes.
"""

# FlyDSL reads annotations as the types they are: no `from __future__ import annotations` here.
from .language import flyc, fx

ROWS = 16
"""Of a block."""
WAVES = 4
_STEP = 128
_RING = 4
_FP8, _FP4 = 0, 4
_LOG2_E = 1.4426950408889634
_INF = float("inf")


@fx.struct
class Shared:
    amax: fx.Array[fx.Float32, WAVES * ROWS, 16]


def buffer(tensor):
    """A buffer whose reads past the end give 0 and whose stores there vanish."""
    return fx.get_iter(fx.rocdl.make_buffer_tensor(tensor, max_size=False))


def expert_buffer(tensor, expert, size: int):
    """The same of one expert's `size` bytes, from a 64-bit address."""
    return fx.rocdl.make_buffer_ptr(fx.get_iter(tensor) + expert * size, num_records_bytes=size)


def times(weight, values, sums, tile: int, weight_scale, step: int, scale):
    """fp32 sums of 16 weight rows by 16 rows over 128 channels; `tile` and `step` are bytes of the
    scales' registers."""
    return fx.Vector(
        fx.rocdl.mfma_scale_f32_16x16x128_f8f6f4(
            fx.Float32x4.ir_type,
            [weight, values, sums, _FP4, _FP8, tile, weight_scale, step, scale],
        )
    )


def silu(x):
    """x / (1 + e^-x): e^-x may overflow, its reciprocal is 0 then."""
    power = fx.Float32(fx.rocdl.exp2(fx.Float32.ir_type, (x * -_LOG2_E).ir_value()))
    return x * fx.Float32(fx.rocdl.rcp(fx.Float32.ir_type, power + 1.0))


def scale_byte(amax):
    """ue8m0 of the least power of two not below max(amax, 1e-4) / 448, 255 for what is not finite:
    448 = 1.75 · 2^8, so the ceiling is a carry out of the mantissa."""
    byte = (fx.max(amax, 1e-4).bitcast(fx.Int32) + 0x1FFFFF) // (1 << 23) - 8
    return (amax < _INF).select(byte, fx.Int32(255))


def hidden(sums, limit, weight):
    """Eight values of a row, rounded to bf16, of gate and up by turns, and the greatest size of
    those that the wave has of it."""
    values = []
    for t in range(2):
        for v in range(4):
            gate = fx.min(sums[2 * t][v], limit)
            up = fx.max(fx.min(sums[2 * t + 1][v], limit), -limit)
            values.append((silu(gate) * up * weight).to(fx.BFloat16).to(fx.Float32))
    amax = fx.Float32(0.0)
    for value in values:
        amax = fx.max(amax, abs(value))
    amax = fx.max(amax, fx.gpu.shuffle_xor(amax, 16, 64))
    return values, fx.max(amax, fx.gpu.shuffle_xor(amax, 32, 64))


def words(values, byte):
    """The eight values as e4m3, four to a word, over the power of two of `byte`."""
    inverse = ((254 - byte) * (1 << 23)).bitcast(fx.Float32)
    found = []
    for t in range(2):
        word = fx.Int32(0)
        for half in range(2):
            a, b = values[t * 4 + half * 2] * inverse, values[t * 4 + half * 2 + 1] * inverse
            word = fx.Int32(fx.rocdl.cvt_pk_fp8_f32(fx.Int32.ir_type, a, b, word, half == 1))
        found.append(word)
    return found


def write_hidden(out, out_scales, past, amaxes, rows: int, row, pair, width: int, wave, values):
    """Writes the eight `values` of a row of the block as e4m3, and their scale in the name of all
    waves, whose `amaxes` [WAVES, `rows`] are shared; what goes to `past` vanishes."""
    amax = amaxes[row]
    for other in range(1, WAVES):
        amax = fx.max(amax, amaxes[other * rows + row])
    byte, g = scale_byte(amax), fx.thread_idx.x % 64 // 16
    column = fx.block_idx.x * _STEP + wave * 32 + g * 4
    for t, word in enumerate(words(values, byte)):
        (buffer(out) + (pair * width + (column + t * 16))).store(word)
    at = pair * (-(-width // 512) * 4) + fx.block_idx.x
    (buffer(out_scales) + ((wave == 0) & (g == 0)).select(at, past)).store(fx.Uint8(byte))


@flyc.kernel
def expert_kernel(
    x: fx.Tensor,
    x_scales: fx.Tensor,
    data: fx.Tensor,
    scales: fx.Tensor,
    pairs: fx.Tensor,
    owners: fx.Tensor,
    routing: fx.Tensor,
    out: fx.Tensor,
    out_scales: fx.Tensor,
    pair_count: fx.Int32,
    limit: fx.Float32,
    width: fx.Constexpr[int],
    inputs: fx.Constexpr[int],
    topk: fx.Constexpr[int],
    gate_up: fx.Constexpr[bool],
):
    """Grid (width / 256, or 128 with `gate_up`; blocks of 16 pairs).

    With `gate_up`: `out` e4m3 [pairs, width] and `out_scales` of the FP8 rows `x` [rows, inputs] of
    the pairs' tokens; gate and up weights by turns, clamp, SiLU, product, routing weight. Without:
    `out` bf16 [pairs, width] of the FP8 rows `x` of the pairs themselves.
    """
    lane, wave = fx.thread_idx.x % 64, fx.thread_idx.x // 64
    r, g = lane % 16, lane // 16
    block = fx.block_idx.y
    owner = fx.rocdl.s_buffer_load(buffer(owners), block)
    shared = fx.SharedAllocator().allocate(Shared).peek()
    steps = inputs // _STEP
    scale_row = -(-steps // 4) * 4
    weight_rows = 2 * width if gate_up else width
    if owner >= 0:
        expert = fx.Int64(owner)
        w = expert_buffer(data, expert, weight_rows * inputs // 2)
        ws = expert_buffer(scales, expert, weight_rows * inputs // 32)
        found = (buffer(pairs) + (block * ROWS + r)).load(fx.Int32)
        pair = (found < 0).select(pair_count, found)  # past the end: read as 0, not stored
        row = pair // topk if gate_up else pair
        x8, xs = buffer(x), buffer(x_scales)
        group = fx.block_idx.x * WAVES + wave

        def fetch(step, slot):
            loads = [
                (w + (((group * 4 + t) * steps + step) * 1024 + lane * 16)).load(fx.Int32x4)
                for t in range(4)
            ]
            at = row * inputs + step * _STEP + g * 16
            loads += [(x8 + at).load(fx.Int32x4), (x8 + (at + 64)).load(fx.Int32x4)]
            loads.append((ws + ((group * steps + step) * 256 + lane * 4)).load(fx.Int32))
            if slot == 0:  # four steps' scales of the row
                loads.append((xs + (row * scale_row + step)).load(fx.Int32))
            return loads

        def consume(sums, ring, slot):
            at = slot * 7 + (slot > 0)
            values = ring[at + 4].shuffle(ring[at + 5], list(range(8)))
            return [
                times(ring[at + t], values, sums[t], t, ring[at + 6], slot, ring[7])
                for t in range(4)
            ]

        ring = []
        for slot in fx.range_constexpr(min(_RING, steps)):
            ring += fetch(fx.Int32(slot), slot)
            fx.rocdl.sched_barrier(0)
        sums = [fx.Vector.filled(4, 0.0, fx.Float32)] * 4
        whole = steps // _RING * _RING
        if fx.const_expr(whole > 0):
            for step, state in range(
                fx.Int32(0), fx.Int32(whole), fx.Int32(_RING), init=sums + ring
            ):
                sums, ring = list(state[:4]), list(state[4:])
                fresh = []
                for slot in fx.range_constexpr(_RING):
                    sums = consume(sums, ring, slot)
                    last = steps - 1 if slot else (steps - 1) // 4 * 4
                    ahead = fx.min(fx.Int32(step) + (_RING + slot), fx.Int32(last))
                    fresh += fetch(ahead, slot)
                    fx.rocdl.sched_barrier(0)
                results = yield sums + fresh
            sums, ring = list(results[:4]), list(results[4:])
        for slot in fx.range_constexpr(steps - whole):
            sums = consume(sums, ring, slot)

        to = buffer(out)
        if fx.const_expr(gate_up):
            weight = (buffer(routing) + pair).load(fx.Float32)
            made, amax = hidden(sums, limit, weight)
            shared.amax[wave * ROWS + r] = amax  # four groups of lanes write the same
            fx.gpu.barrier()
            past = pair_count * (-(-width // 512) * 4)
            write_hidden(out, out_scales, past, shared.amax, ROWS, r, pair, width, wave, made)
        else:
            if group * 64 < width:
                for t in fx.range_constexpr(4):
                    at = pair * width + group * 64 + t * 16 + g * 4
                    (to + at).store(sums[t].to(fx.BFloat16))
