"""Both products of an expert for a block of 16 rows: FP8 weights of Base checkpoints, in the order
of prepared.py, by FP8 activations.

As expert_kernels.py, whose instruction takes no scale that is not a power of two: a weight's scale,
one fp32 number for 128 by 128, multiplies the sums of each step of 128 channels before they are
added up. A weight is twice as wide, so two steps are on their way: 20 KiB of a wave.

Byte floor of a block: 1 byte a weight, 1.01 an input of each row, what it writes.
"""

# FlyDSL reads annotations as the types they are: no `from __future__ import annotations` here.
from .expert_kernels import ROWS, WAVES, Shared, buffer, expert_buffer, hidden, write_hidden
from .language import flyc, fx

_STEP = 128
_WORD = 4
"""Steps whose row scales come in one word."""
_AHEAD = 2
_FP8 = 0
_ONE = 127
"""ue8m0 of 1."""


def _times(weight, values, step: int, scale):
    """fp32 sums of 16 weight rows by 16 rows over 128 channels; `step` is a byte of `scale`."""
    return fx.Vector(
        fx.rocdl.mfma_scale_f32_16x16x128_f8f6f4(
            fx.Float32x4.ir_type,
            [
                *(weight, values, fx.Vector.filled(4, 0.0, fx.Float32)),
                *(_FP8, _FP8, 0, fx.Int32(_ONE), step, scale),
            ],
        )
    )


@flyc.kernel
def expert_fp8_kernel(
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
    """As `expert_kernel`, with `scales` fp32 [experts, rows / 128, inputs / 128]: those of gate,
    then those of up."""
    lane, wave = fx.thread_idx.x % 64, fx.thread_idx.x // 64
    r, g = lane % 16, lane // 16
    block = fx.block_idx.y
    owner = fx.rocdl.s_buffer_load(buffer(owners), block)
    shared = fx.SharedAllocator().allocate(Shared).peek()
    steps = inputs // _STEP
    scale_row = -(-steps // _WORD) * _WORD
    weight_rows = 2 * width if gate_up else width
    if owner >= 0:
        expert = fx.Int64(owner)
        w = expert_buffer(data, expert, weight_rows * inputs)
        found = (buffer(pairs) + (block * ROWS + r)).load(fx.Int32)
        pair = (found < 0).select(pair_count, found)  # past the end: read as 0, not stored
        row = pair // topk if gate_up else pair
        x8, xs, ws = buffer(x), buffer(x_scales), buffer(scales)
        group = fx.block_idx.x * WAVES + wave
        # 64 rows are of 32 features of gate and of up, or of 64 of down.
        scale_rows = [fx.block_idx.x, fx.block_idx.x + width // 128] if gate_up else [group // 2]
        scale_count = weight_rows // 128 * steps

        def fetch(step):
            loads = [
                (w + ((((group * 4 + t) * steps + step) * 2 + i) * 1024 + lane * 16)).load(
                    fx.Int32x4
                )
                for t in range(4)
                for i in range(2)
            ]
            at = row * inputs + step * _STEP + g * 16
            loads += [(x8 + at).load(fx.Int32x4), (x8 + (at + 64)).load(fx.Int32x4)]
            return loads + [
                (ws + (owner * scale_count + each * steps + step)).load(fx.Float32)
                for each in scale_rows
            ]

        def row_scales(step):
            """Of four steps from `step` on."""
            return (xs + (row * scale_row + step)).load(fx.Int32)

        def joined(low, high):
            return low.shuffle(high, list(range(8)))

        def consume(sums, loads, by_row, slot):
            values = joined(loads[8], loads[9])
            made = []
            for t in fx.range_constexpr(4):
                part = _times(joined(loads[2 * t], loads[2 * t + 1]), values, slot, by_row)
                factor = loads[10 + t % 2] if gate_up else loads[10]
                made.append(sums[t] + part * factor)
            return made

        count = 12 if gate_up else 11
        by_row = row_scales(fx.Int32(0))
        fx.rocdl.sched_barrier(0)
        ring = []
        for slot in fx.range_constexpr(min(_AHEAD, steps)):
            ring += fetch(fx.Int32(slot))
            fx.rocdl.sched_barrier(0)
        sums = [fx.Vector.filled(4, 0.0, fx.Float32)] * 4
        whole = steps // _WORD * _WORD
        if fx.const_expr(whole > 0):
            for step, state in range(
                fx.Int32(0), fx.Int32(whole), fx.Int32(_WORD), init=sums + [by_row] + ring
            ):
                sums, by_row, ring = list(state[:4]), state[4], list(state[5:])
                next_by_row = by_row
                for slot in fx.range_constexpr(_WORD):
                    sums = consume(sums, ring[:count], by_row, slot)
                    ring = ring[count:]
                    ahead = fx.min(fx.Int32(step) + (slot + _AHEAD), fx.Int32(steps - 1))
                    ring += fetch(ahead)
                    if slot == 0:
                        first = fx.min(
                            fx.Int32(step) + _WORD, fx.Int32((steps - 1) // _WORD * _WORD)
                        )
                        next_by_row = row_scales(first)
                    fx.rocdl.sched_barrier(0)
                results = yield sums + [next_by_row] + ring
            sums, by_row, ring = list(results[:4]), results[4], list(results[5:])
        left = steps - whole
        for slot in fx.range_constexpr(left):
            sums = consume(sums, ring[:count], by_row, slot)
            ring = ring[count:]
            if slot + _AHEAD < left:
                ring += fetch(fx.Int32(whole + slot + _AHEAD))

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
