"""The matrix products of every projection: a weight times the rows of a step, in one launch.

Weight rows are the rows of a tile and tokens its columns, so that a step of few tokens still fills
the matrix units. FP8 weights (128x128 scales) meet FP8 activations (a scale a token and 128
channels): each block of 128 channels is one product from zero, whose scales are powers of two or
fp32 and applied to its fp32 sums. bf16 weights meet bf16 activations and give fp32.

Few rows: the channels are cut into chunks, a program each, and the program of a tile that arrives
last adds the parts in their order and writes the result. Many rows: a program goes through all
chunks itself and adds them in the same order. The chunks follow from the weight alone and all tiles
take one matrix instruction, so a row has the same bits in any batch; nothing depends on who arrives
last but which program does the adding.

Variants: types of input, weight and result, tile.

Byte floor: the weight once (1 byte an element, 2 for bf16), inputs and results of each row. A split
product hands chunks · 4 bytes a result over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import device
from .formats import (
    INTERPRETED,
    fp8_operand,
    fp8_scale,
    is_fnuz,
    round_to_bf16,
    to_bf16,
    to_fp8_bytes,
)

BLOCK = 128
"""Channels that share an activation's scale; side of a weight's scale block."""
FEW_TOKENS = 64
"""Up to here a product quantises its bf16 input itself; above, a launch before it does."""
_LEAST_PROGRAMS = 192
_LEAST_CHUNK = 384
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _quantized(x):
    """(e4m3 bytes [128, n], fp32 scale [n]) of bf16 rows `x` [n, 128], held in fp32."""
    scale, inverse, _ = fp8_scale(tl.max(tl.abs(x), 1))
    return tl.trans(to_fp8_bytes(x * inverse[:, None])), scale


@triton.jit
def _weight_factor(scale, E8M0: tl.constexpr):
    """fp32 of a weight's scale, a ue8m0 byte with E8M0; byte 0 is 2^-127, a denormal."""
    if E8M0:
        byte = scale.to(tl.int32)
        return tl.where(byte == 0, 0x400000, byte << 23).to(tl.float32, bitcast=True)
    else:
        return scale


@triton.jit
def _chunk(
    x,
    x_scale,
    weight,
    weight_scale,
    x_at,
    scale_at,
    weight_at,
    first,
    begin,
    end,
    FP8: tl.constexpr,
    QUANTIZE: tl.constexpr,
    E8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STEP: tl.constexpr,
):
    """fp32 [BLOCK_ROWS, BLOCK_TOKENS]: the product over channels `begin` .. `end` - 1, of which
    `first` is the input's own number of channel 0."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    channel = tl.arange(0, STEP)
    for start in range(begin, end, STEP):
        left = tl.load(weight + weight_at[:, None] + (start + channel)[None, :])
        if not FP8:
            right = tl.load(x + x_at[None, :] + (first + start + channel)[:, None])
            if INTERPRETED:
                total = tl.dot(
                    left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee"
                )
            else:
                total = tl.dot(left, right, total)
        else:
            if QUANTIZE:
                row = tl.load(x + x_at[:, None] + (first + start + channel)[None, :])
                right, factor = _quantized(row.to(tl.float32))
                if not FNUZ:
                    right = right.to(tl.float8e4nv, bitcast=True)
            else:
                right = tl.load(x + x_at[None, :] + (first + start + channel)[:, None])
                factor = tl.load(x_scale + scale_at + (first + start) // _BLOCK)
            factor *= _weight_factor(tl.load(weight_scale + start // _BLOCK), E8M0)
            part = tl.dot(fp8_operand(left, FNUZ), fp8_operand(right, FNUZ))
            total += part * ((factor * 4.0) if FNUZ else factor)[None, :]
    return total


@triton.jit
def _write(
    total,
    out,
    out_scale,
    row,
    token,
    rows,
    tokens,
    second,
    third,
    OUT: tl.constexpr,
):
    """Stores a tile; results before row `second`, up to row `third` and from it on are tensors
    [T, n] one after the other."""
    real = (row < rows)[:, None] & (token < tokens)[None, :]
    start = tl.where(row >= third, third, tl.where(row >= second, second, 0)).to(tl.int64)
    end = tl.where(row >= third, rows, tl.where(row >= second, third, second))
    at = (start * tokens + row - start)[:, None] + token[None, :] * (end - start)[:, None]
    if OUT == "fp32":
        tl.store(out + at, total, mask=real)
    elif OUT == "bf16":
        tl.store(out + at, to_bf16(total), mask=real)
    else:
        total = round_to_bf16(total)
        scale, inverse, _ = fp8_scale(tl.max(tl.abs(total), 0))
        tl.store(out + at, to_fp8_bytes(total * inverse[None, :]), mask=real)
        to = out_scale + token * (rows // _BLOCK) + tl.min(row, 0) // _BLOCK
        tl.store(to, scale, mask=token < tokens)


@triton.jit
def _all_stored(x, WAIT: tl.constexpr):
    """Past it, what any thread of the workgroup stored is in the cache that `x`'s atomic releases.

    A barrier of AMD's compiler lets a wave's stores be on their way still, and a release waits for
    those of its own wave alone: WAIT has every wave wait for its own before the barrier.
    """
    if WAIT:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1",
            "=v,v,~{memory}",
            [x],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    tl.debug_barrier()


# Scales are read one at a time: how their rows are aligned changes no load.
@triton.jit(
    do_not_specialize=("tokens", "chunks", "split"),
    do_not_specialize_on_alignment=("scale_stride", "scale_columns"),
)
def product_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    out,
    out_scale,
    parts,
    arrived,
    tokens,
    rows,
    inputs,
    group_rows,
    x_stride,
    scale_stride,
    scale_columns,
    second,
    third,
    chunk,
    chunks,
    split,
    FP8: tl.constexpr,
    QUANTIZE: tl.constexpr,
    E8M0: tl.constexpr,
    FNUZ: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Grid (row tiles, token tiles, chunks if `split`, else 1): `group_rows` weight rows share the
    input's channels, the next as many take the next `inputs` channels. SPLIT is `split`, or None
    where that is known at run time alone."""
    if SPLIT is not None:
        split = SPLIT
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    # What lies past the end repeats the last row and is not stored: no load needs a mask.
    weight_at = tl.minimum(row, rows - 1).to(tl.int64) * inputs
    token_at = tl.minimum(token, tokens - 1)
    first = tl.program_id(0) * BLOCK_ROWS // group_rows * inputs
    scale_row = weight_scale + tl.program_id(0) * BLOCK_ROWS // _BLOCK * scale_columns
    x_at, scale_at = token_at * x_stride, token_at * scale_stride
    start = tl.program_id(2) * chunk
    if SPLIT:
        total = _chunk(
            x,
            x_scale,
            weight,
            scale_row,
            x_at,
            scale_at,
            weight_at,
            first,
            start,
            tl.minimum(start + chunk, inputs),
            FP8,
            QUANTIZE,
            E8M0,
            FNUZ,
            BLOCK_ROWS,
            BLOCK_TOKENS,
            STEP,
        )
    else:
        total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
        end = tl.minimum(start + chunk, inputs) if split else inputs
        for begin in range(start, end, chunk):
            total += _chunk(
                x,
                x_scale,
                weight,
                scale_row,
                x_at,
                scale_at,
                weight_at,
                first,
                begin,
                tl.minimum(begin + chunk, inputs),
                FP8,
                QUANTIZE,
                E8M0,
                FNUZ,
                BLOCK_ROWS,
                BLOCK_TOKENS,
                STEP,
            )
    writes = True
    if split:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        size: tl.constexpr = BLOCK_ROWS * BLOCK_TOKENS
        within = (
            tl.arange(0, BLOCK_ROWS)[:, None] + tl.arange(0, BLOCK_TOKENS)[None, :] * BLOCK_ROWS
        )
        at = parts + tile.to(tl.int64) * (chunks * size) + within
        real = (token < tokens)[None, :]
        tl.store(at + tl.program_id(2) * size, total, mask=real)
        # A workgroup's parts are stored before its arrival counts (release), and the last to arrive
        # sees those of the others (acquire).
        _all_stored(tile, WAIT)
        writes = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == chunks - 1
        if writes:
            total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
            at_once: tl.constexpr = max(1, min(8, 16384 // size))
            for before in range(0, chunks, at_once):
                for each in tl.static_range(at_once):  # loads that are on their way together
                    there = real & (before + each < chunks)
                    total += tl.load(at + (before + each) * size, mask=there, other=0.0)
            tl.store(arrived + tile, 0)
    if writes:
        _write(total, out, out_scale, row, token, rows, tokens, second, third, OUT)


@triton.jit
def quantize_kernel(x, codes, scales, x_stride, columns, BLOCKS: tl.constexpr):
    """Grid (T, ceil(columns / (BLOCKS * 128))): e4m3 and scales of blocks of 128 channels."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    channel = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    real = channel < columns
    x = tl.load(x + row * x_stride + channel, mask=real, other=0.0).to(tl.float32)
    scale, inverse, _ = fp8_scale(tl.max(tl.abs(x), 1))
    tl.store(codes + row * columns + channel, to_fp8_bytes(x * inverse[:, None]), mask=real)
    count = columns // _BLOCK
    tl.store(scales + row * count + block, scale, mask=block < count)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """quantize_fp8 of bf16 `x` [T, n] in blocks of 128, in one launch."""
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, columns // BLOCK, dtype=torch.float32, device=x.device)
    blocks = min(8, triton.next_power_of_2(columns // BLOCK))
    quantize_kernel[(rows, triton.cdiv(columns, blocks * BLOCK))](
        x, codes.view(torch.uint8), scales, x.stride(0), columns, BLOCKS=blocks, num_warps=2
    )
    return codes, scales


@dataclass(frozen=True)
class Tiling:
    """How one product is cut."""

    block_rows: int
    block_tokens: int
    chunk: int
    """Channels; follows from the weight alone."""
    chunks: int
    split: bool

    @property
    def num_warps(self) -> int:
        large = self.block_rows * self.block_tokens >= 128 * 64
        return 8 if large and not device.arch().startswith("sm_") else 4

    @property
    def num_stages(self) -> int:
        """Few tokens stream the weight: several tiles of it are on their way."""
        return 4 if self.block_tokens <= 32 else 3 if device.arch().startswith("sm_") else 2


def _least_tokens() -> int:
    """Of a tile: on gfx950 32 issue as much a pass as 16 and have more bytes on their way; on
    gfx942 registers would hold one workgroup instead of two."""
    return 32 if device.arch() == "gfx950" else 16


def _most_tokens() -> int:
    """Of a tile: registers hold three sums of each of its elements, and on gfx942 the bytes on
    their way to being operands."""
    return 128 if device.arch() == "gfx950" else 64


def tiling(tokens: int, rows: int, inputs: int, whole_blocks: bool = False) -> Tiling:
    """Tiles of `tokens` rows times a weight [rows, inputs]; with `whole_blocks` each holds 128
    weight rows."""
    least = BLOCK if whole_blocks else BLOCK // 2
    tiles, chunks = triton.cdiv(rows, least), 1
    while tiles * chunks < _LEAST_PROGRAMS and inputs // (2 * chunks) >= _LEAST_CHUNK:
        chunks *= 2
    chunk = triton.cdiv(triton.cdiv(inputs, BLOCK), chunks) * BLOCK
    chunks = triton.cdiv(inputs, chunk)
    block_tokens = min(
        max(_least_tokens(), triton.next_power_of_2(tokens)), 64 if tokens < 256 else _most_tokens()
    )
    block_rows = least if tokens < 256 else BLOCK
    if device.arch().startswith("sm_") and tokens >= 256:  # 64 by 128, what four warps hold
        block_rows, block_tokens = least, BLOCK * BLOCK // 2 // least
    programs = triton.cdiv(rows, block_rows) * triton.cdiv(tokens, block_tokens)
    return Tiling(
        block_rows, block_tokens, chunk, chunks, chunks > 1 and programs < _LEAST_PROGRAMS
    )


_ARRIVED: dict[tuple, Tensor] = {}


def _arrived(where: torch.device) -> Tensor:
    """int32 zeros, one a tile, which every launch leaves as it found them.

    One set a stream, whose launches follow one another, and one for graphs, of which one is
    replayed at a time. A graph captured before any eager call clears a set of its own.
    """
    capturing = where.type == "cuda" and torch.cuda.is_current_stream_capturing()
    stream = None
    if where.type == "cuda" and not capturing:
        stream = torch.cuda.current_stream(where).cuda_stream
    for key in ((where, None), (where, stream)):
        if key not in _ARRIVED:
            zeros = torch.zeros(_LEAST_PROGRAMS, dtype=torch.int32, device=where)
            if capturing:
                return zeros
            _ARRIVED[key] = zeros
    return _ARRIVED[where, stream]


def multiply(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    out: str,
    groups: int = 1,
    parts: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """(results [T · rows], their scales [T, rows/128] or None, results by `parts`) of `x` times
    `weight` [rows, inputs].

    `x` [T, groups · inputs] is bf16, or e4m3 with `x_scale`; group g of the weight's rows takes the
    g-th `inputs` channels. `out` is "bf16", "fp32" or "fp8".
    """
    tokens, (rows, inputs) = x.shape[0], weight.shape
    fp8 = weight_scale is not None
    if fp8 and x_scale is None and tokens > FEW_TOKENS:
        x, x_scale = quantize(x)
    cut = tiling(tokens, rows, inputs, out == "fp8" or groups > 1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}[out]
    flat = torch.empty(tokens * rows, dtype=dtype, device=x.device)
    out_scale = None
    if out == "fp8":
        out_scale = torch.empty(tokens, rows // BLOCK, dtype=torch.float32, device=x.device)
    if tokens:
        _launch(x, x_scale, weight, weight_scale, flat, out_scale, cut, groups, parts, out)
    sizes = parts or (rows,)
    cut_up = flat.split([tokens * size for size in sizes])
    return flat, out_scale, [each.view(tokens, size) for each, size in zip(cut_up, sizes)]


def _launch(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    flat: Tensor,
    out_scale: Tensor | None,
    cut: Tiling,
    groups: int,
    parts: tuple[int, ...],
    out: str,
) -> None:
    tokens, (rows, inputs) = x.shape[0], weight.shape
    fp8, fnuz, quantizes = weight_scale is not None, is_fnuz(), x.dtype == torch.bfloat16
    grid = (triton.cdiv(rows, cut.block_rows), triton.cdiv(tokens, cut.block_tokens))
    size = grid[0] * grid[1] * cut.chunks * cut.block_rows * cut.block_tokens if cut.split else 1
    parts_of_sums = torch.empty(size, dtype=torch.float32, device=x.device)
    # Where programs take all chunks neither is read.
    arrived = _arrived(x.device) if cut.split else parts_of_sums.view(torch.int32)
    ends = [sum(parts[: i + 1]) for i in range(len(parts))][:2] + [rows, rows]
    codes = torch.uint8 if fnuz else torch.float8_e4m3fn
    amd = device.arch().startswith("gfx")
    e8m0 = fp8 and weight_scale.dtype == torch.float8_e8m0fnu
    product_kernel[(*grid, cut.chunks if cut.split else 1)](
        x if quantizes else x.view(codes),
        x if x_scale is None else x_scale,
        weight.view(codes) if fp8 else weight,
        weight_scale.view(torch.uint8) if e8m0 else weight_scale if fp8 else weight,
        flat.view(torch.uint8) if out == "fp8" else flat,
        flat if out_scale is None else out_scale,
        parts_of_sums,
        arrived,
        tokens,
        rows,
        inputs,
        rows // groups,
        x.stride(0),
        0 if x_scale is None else x_scale.stride(0),
        weight_scale.stride(0) if fp8 else 0,
        ends[0],
        ends[1],
        cut.chunk,
        cut.chunks,
        cut.split,
        FP8=fp8,
        QUANTIZE=fp8 and quantizes,
        E8M0=e8m0,
        FNUZ=fp8 and fnuz,
        OUT=out,
        BLOCK_ROWS=cut.block_rows,
        BLOCK_TOKENS=cut.block_tokens,
        STEP=BLOCK if fp8 else BLOCK // 2,
        # The scalars of both ways at once are more than gfx942's compiler keeps in registers.
        SPLIT=cut.split if device.arch() == "gfx942" else None,
        WAIT=amd,
        num_warps=cut.num_warps,
        num_stages=cut.num_stages,
        **({"matrix_instr_nonkdim": 16} if amd else {}),
    )
