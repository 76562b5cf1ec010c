"""Both products of an expert for a block of 64 rows, where an expert has more of them than the 16
of expert_kernels.py: its weights are read a quarter as often.

A wave makes 64 rows of a weight by the block's 64 rows: 16 products a step of 128 channels. The
rows of a step come into local memory past the registers (`buffer_load_dwordx4 ... lds`), 8 KiB of
four stages: three steps are on their way while one is multiplied. The hardware writes lane L's 16
bytes at 16 L, so the order that spares bank conflicts is in the addresses they are read from: piece
p of row t lies at p ^ (t % 8). Weights go straight into registers, three steps ahead too. One
barrier a step: everybody's rows have come, and everybody has read the stage that is filled next.

Byte floor of a block: 0.53 bytes a weight, 1.01 an input of each row, what it writes.
"""

# FlyDSL reads annotations as the types they are: no `from __future__ import annotations` here.
from .expert_kernels import WAVES, buffer, expert_buffer, hidden, times, write_hidden
from .language import flyc, fx

ROWS = 64
"""Of a block."""
_TILES = ROWS // 16
_STEP = 128
_STAGES = 4
_AHEAD = _STAGES - 1
_STAGE = ROWS * _STEP


@fx.struct
class Shared:
    rows: fx.Array[fx.Uint8, _STAGES * _STAGE, 16]
    amax: fx.Array[fx.Float32, WAVES * ROWS, 16]


@flyc.kernel
def expert_rows_kernel(
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
    """Grid (width / 256, or 128 with `gate_up`; blocks of 64 pairs); the rest as of
    `expert_kernel`."""
    thread = fx.thread_idx.x
    lane, wave = thread % 64, thread // 64
    r, g = lane % 16, lane // 16
    block = fx.block_idx.y
    owner = fx.rocdl.s_buffer_load(buffer(owners), block)
    shared = fx.SharedAllocator().allocate(Shared).peek()
    dma = fx.make_copy_atom(fx.rocdl.cdna4.BufferLoadAsyncLDS128b(), 128)
    same_wave = fx.Int32(fx.rocdl.readfirstlane(fx.Int32.ir_type, wave))
    steps = inputs // _STEP
    scale_row = -(-steps // 4) * 4
    weight_rows = 2 * width if gate_up else width
    if owner >= 0:
        expert = fx.Int64(owner)
        w = expert_buffer(data, expert, weight_rows * inputs // 2)
        ws = expert_buffer(scales, expert, weight_rows * inputs // 32)
        x8, xs = buffer(x), buffer(x_scales)
        group = fx.block_idx.x * WAVES + wave

        def pair_of(row):
            """Of a row of the block; past the end where there is none: read as 0, not stored."""
            found = (buffer(pairs) + (block * ROWS + row)).load(fx.Int32)
            return (found < 0).select(pair_count, found)

        def input_of(pair):
            return pair // topk if gate_up else pair

        tile_pairs = [pair_of(tile * 16 + r) for tile in range(_TILES)]
        copied = [input_of(pair_of(part * 32 + thread // 8)) * inputs for part in range(2)]

        def stage(step, slot):
            """Two instructions of a wave: 16 bytes a thread from 32 rows each."""
            for part in fx.range_constexpr(2):
                piece = (thread % 8) ^ (thread // 8 % 8)
                source = fx.recast_iter(fx.Uint8, x8) + (copied[part] + step * _STEP + piece * 16)
                place = slot * _STAGE + part * 4096
                target = shared.rows.ptr + (same_wave * 1024 + place)
                one_piece = fx.make_layout(16, 1)
                fx.copy(dma, fx.make_view(source, one_piece), fx.make_view(target, one_piece))
            fx.rocdl.asyncmark()

        def weights(step):
            loads = [
                (w + (((group * 4 + t) * steps + step) * 1024 + lane * 16)).load(fx.Int32x4)
                for t in range(4)
            ]
            return loads + [(ws + ((group * steps + step) * 256 + lane * 4)).load(fx.Int32)]

        def row_scales(step):
            """Of four steps from `step` on."""
            return [
                (xs + (input_of(pair) * scale_row + step)).load(fx.Int32) for pair in tile_pairs
            ]

        def operand(slot, tile):
            row = tile * 16 + r
            halves = [
                (shared.rows.ptr + (row * _STEP + ((g + 4 * i) ^ (r % 8)) * 16 + slot * _STAGE))
                .load(fx.Uint8x16)
                .bitcast(fx.Int32)
                for i in range(2)
            ]
            return halves[0].shuffle(halves[1], list(range(8)))

        def consume(sums, loads, by_row, slot):
            fresh = []
            for tile in fx.range_constexpr(_TILES):
                values = operand(slot, tile)
                fresh += [
                    times(loads[t], values, sums[4 * tile + t], t, loads[4], slot, by_row[tile])
                    for t in range(4)
                ]
            return fresh

        count = 5
        by_row = row_scales(fx.Int32(0))
        fx.rocdl.sched_barrier(0)
        ring = []
        for slot in fx.range_constexpr(min(_AHEAD, steps)):
            stage(fx.Int32(slot), slot)
            ring += weights(fx.Int32(slot))
            fx.rocdl.sched_barrier(0)
        sums = [fx.Vector.filled(4, 0.0, fx.Float32)] * (4 * _TILES)
        whole = steps // _STAGES * _STAGES
        if fx.const_expr(whole > 0):
            for step, state in range(
                fx.Int32(0), fx.Int32(whole), fx.Int32(_STAGES), init=sums + by_row + ring
            ):
                sums, by_row = list(state[: 4 * _TILES]), list(state[4 * _TILES : 5 * _TILES])
                ring = list(state[5 * _TILES :])
                next_by_row = by_row
                for slot in fx.range_constexpr(_STAGES):
                    fx.rocdl.wait_asyncmark(_AHEAD - 1)
                    fx.gpu.barrier()
                    ahead = fx.min(fx.Int32(step) + (slot + _AHEAD), fx.Int32(steps - 1))
                    stage(ahead, (slot + _AHEAD) % _STAGES)
                    ring += weights(ahead)
                    if slot == 1:
                        first = fx.min(fx.Int32(step) + _STAGES, fx.Int32((steps - 1) // 4 * 4))
                        next_by_row = row_scales(first)
                    fx.rocdl.sched_barrier(0)
                    sums = consume(sums, ring[:count], by_row, slot)
                    ring = ring[count:]
                results = yield sums + next_by_row + ring
            sums, by_row = list(results[: 4 * _TILES]), list(results[4 * _TILES : 5 * _TILES])
            ring = list(results[5 * _TILES :])
        fx.rocdl.wait_asyncmark(0)
        fx.gpu.barrier()
        for slot in fx.range_constexpr(steps - whole):
            sums = consume(sums, ring[slot * count : (slot + 1) * count], by_row, slot)

        to = buffer(out)
        if fx.const_expr(gate_up):
            made = []
            for tile in fx.range_constexpr(_TILES):
                weight = (buffer(routing) + tile_pairs[tile]).load(fx.Float32)
                values, amax = hidden(sums[4 * tile : 4 * tile + 4], limit, weight)
                made.append(values)
                shared.amax[wave * ROWS + tile * 16 + r] = amax
            fx.gpu.barrier()
            past = pair_count * (-(-width // 512) * 4)
            for tile in fx.range_constexpr(_TILES):
                row, pair = tile * 16 + r, tile_pairs[tile]
                write_hidden(
                    out, out_scales, past, shared.amax, ROWS, row, pair, width, wave, made[tile]
                )
        else:
            if group * 64 < width:
                for tile in fx.range_constexpr(_TILES):
                    for t in fx.range_constexpr(4):
                        at = tile_pairs[tile] * width + group * 64 + t * 16 + g * 4
                        (to + at).store(sums[4 * tile + t].to(fx.BFloat16))
