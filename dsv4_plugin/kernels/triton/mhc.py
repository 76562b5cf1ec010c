"""Hyper-connections: the mixing of four residual streams before and after every sub-layer.

`project` reads the streams once: it mixes the last sub-layer's output into them where there is one
(and writes them back), multiplies them by `fn` and sums their squares, a stripe of channels a
program. `finish` adds the stripes of a row, runs Sinkhorn on its 4x4 in registers, collapses the
streams, norms and quantises. Two launches a sub-layer, whatever the number of rows.

The product is as exact as fp32: streams are bf16, and an fp32 weight is the exact sum of three bf16
numbers (24 = 3 · 8 bits), so the matrix units multiply bf16 without any rounding and add in fp32.
That leaves the error of an fp32 sum, 2^-24 of the largest partial sum a term; TF32 would lose 2^-11
of every product. Tiles, stripes and their order do not depend on the number of rows: a row has the
same bits in any batch.

Byte floor of a row: 8·d for the streams read, 8·d written and 2·d for the output where a sub-layer
comes in, 8·d read once more by `finish` (from cache in a decode step), 2·d + d for what it writes.
`fn` (4·24·4·d bytes) is read by every block of rows. A stripe hands over 128 bytes a row.

Variants: whether a sub-layer comes in, the last one or not; on NVIDIA few rows or many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import device
from .formats import INTERPRETED, fp8_scale, round_to_bf16, to_bf16, to_fp8_bytes

_STRIPE = 128
_CHANNELS = 32
_ROWS = 32
"""Of a tile, whatever the number of rows: the same sums in the same order."""
_COLUMNS = tl.constexpr(32)
"""Of a stripe's partial result: the mixes, the sum of squares after them, padding."""
_BLOCK = tl.constexpr(128)
_STREAMS = 4


@triton.jit
def _add_product(total, x, weight):
    """`total` + `x` @ `weight` for bf16 values `x` (held in fp32) and fp32 `weight`, without
    rounding a product."""
    high = round_to_bf16(weight)
    middle = round_to_bf16(weight - high)
    low = weight - high - middle
    if INTERPRETED:
        total = tl.dot(x, low, total, input_precision="ieee")
        total = tl.dot(x, middle, total, input_precision="ieee")
        return tl.dot(x, high, total, input_precision="ieee")
    else:
        x = x.to(tl.bfloat16)
        total = tl.dot(x, low.to(tl.bfloat16), total)
        total = tl.dot(x, middle.to(tl.bfloat16), total)
        return tl.dot(x, high.to(tl.bfloat16), total)


@triton.jit
def _mixed(y, h0, h1, h2, h3, post, comb, row, inside, STREAM: tl.constexpr):
    """Stream STREAM after a sub-layer, rounded to bf16: post_k · y + sum_j comb_jk · h_j."""
    at = comb + row * 16 + STREAM
    x = tl.load(at, mask=inside, other=0.0)[:, None] * h0
    x += tl.load(at + 4, mask=inside, other=0.0)[:, None] * h1
    x += tl.load(at + 8, mask=inside, other=0.0)[:, None] * h2
    x += tl.load(at + 12, mask=inside, other=0.0)[:, None] * h3
    x += tl.load(post + row * 4 + STREAM, mask=inside, other=0.0)[:, None] * y
    return round_to_bf16(x)


@triton.jit(do_not_specialize=("rows",))
def mhc_project_kernel(
    streams,
    row_stride,
    stream_stride,
    y,
    y_stride,
    post,
    comb,
    out_streams,
    fn,
    partial,
    rows,
    dim,
    MIXES: tl.constexpr,
    POST: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPE: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid (ceil(T / ROWS), ceil(dim / STRIPE)): a stripe of channels of all four streams.

    With POST the streams are those after the sub-layer whose output is `y`, and are written.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, _COLUMNS)
    total = tl.zeros((ROWS, _COLUMNS), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, STRIPE, CHANNELS):
        channel = tl.program_id(1) * STRIPE + start + tl.arange(0, CHANNELS)
        real = inside[:, None] & (channel < dim)[None, :]
        at = streams + row[:, None] * row_stride + channel[None, :]
        h0 = tl.load(at, mask=real, other=0.0).to(tl.float32)
        h1 = tl.load(at + stream_stride, mask=real, other=0.0).to(tl.float32)
        h2 = tl.load(at + 2 * stream_stride, mask=real, other=0.0).to(tl.float32)
        h3 = tl.load(at + 3 * stream_stride, mask=real, other=0.0).to(tl.float32)
        if POST:
            added = tl.load(
                y + row[:, None] * y_stride + channel[None, :], mask=real, other=0.0
            ).to(tl.float32)
        for stream in tl.static_range(4):
            if POST:
                x = _mixed(added, h0, h1, h2, h3, post, comb, row, inside, stream)
                to = out_streams + (row[:, None] * 4 + stream) * dim + channel[None, :]
                tl.store(to, to_bf16(x), mask=real)
            elif stream == 0:
                x = h0
            elif stream == 1:
                x = h1
            elif stream == 2:
                x = h2
            else:
                x = h3
            squares += tl.sum(x * x, 1)
            weight = tl.load(
                fn + column[None, :] * (4 * dim) + stream * dim + channel[:, None],
                mask=(column < MIXES)[None, :] & (channel < dim)[:, None],
                other=0.0,
            )
            total = _add_product(total, x, weight)
    total = tl.where(column[None, :] == MIXES, squares[:, None], total)
    to = partial + (tl.program_id(1) * rows + row[:, None]) * _COLUMNS + column[None, :]
    tl.store(to, total, mask=inside[:, None])


@triton.jit
def _sinkhorn(logits, iterations, eps):
    """[4, 4]: softmax of the rows, then columns and rows divided by their sums in turn."""
    c = tl.exp(logits - tl.max(logits, 1)[:, None])
    c = c / tl.sum(c, 1)[:, None] + eps
    c = c / (tl.sum(c, 0) + eps)[None, :]
    for _ in range(iterations - 1):
        c = c / (tl.sum(c, 1) + eps)[:, None]
        c = c / (tl.sum(c, 0) + eps)[None, :]
    return c


@triton.jit(do_not_specialize=("rows",))
def mhc_finish_kernel(
    streams,
    row_stride,
    stream_stride,
    partial,
    base,
    scale,
    norm_weight,
    out,
    codes,
    code_scale,
    out_post,
    out_comb,
    rows,
    dim,
    stripes,
    iterations,
    eps,
    norm_eps,
    MIXES: tl.constexpr,
    NORM: tl.constexpr,
    QUANTIZE: tl.constexpr,
    STRIPES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid (T): one row. MIXES is 24 before a sub-layer, 4 before the head."""
    row = tl.program_id(0).to(tl.int64)
    stripe, column = tl.arange(0, STRIPES), tl.arange(0, _COLUMNS)
    at = partial + (stripe[:, None] * rows + row) * _COLUMNS
    sums = tl.sum(tl.load(at + column[None, :], mask=stripe[:, None] < stripes, other=0.0), 0)
    square = tl.sum(tl.where(column == MIXES, sums, 0.0), 0)
    factor = tl.rsqrt(square / (4 * dim) + norm_eps)
    group = tl.minimum(column // 4, 2) if MIXES == 24 else column * 0
    logits = sums * factor * tl.load(scale + group)
    logits += tl.load(base + column, mask=column < MIXES, other=0.0)
    gate = 1 / (1 + tl.exp(-logits))
    if MIXES == 24:
        is_post = (column >= 4) & (column < 8)
        tl.store(out_post + row * 4 + column - 4, 2 * gate, mask=is_post)
        cell = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        part = tl.load(
            at[:, :, None] + 8 + cell[None, :, :], mask=stripe[:, None, None] < stripes, other=0.0
        )
        c = tl.sum(part, 0) * factor * tl.load(scale + 2) + tl.load(base + 8 + cell)
        tl.store(out_comb + row * 16 + cell, _sinkhorn(c, iterations, eps))
    channel = tl.arange(0, BLOCKS)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    real = channel < dim
    x = tl.zeros((BLOCKS, _BLOCK), tl.float32)
    for stream in tl.static_range(4):
        h = tl.load(
            streams + row * row_stride + stream * stream_stride + channel, mask=real, other=0.0
        )
        x += tl.sum(tl.where(column == stream, gate + eps, 0.0), 0) * h.to(tl.float32)
    x = round_to_bf16(x)
    if NORM:
        inverse = tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / dim + norm_eps)
        weight = tl.load(norm_weight + channel, mask=real, other=0.0).to(tl.float32)
        x = round_to_bf16(x * inverse * weight)
    tl.store(out + row * dim + channel, to_bf16(x), mask=real)
    if QUANTIZE:
        block = tl.arange(0, BLOCKS)
        power, inverse_power, _ = fp8_scale(tl.max(tl.abs(x), 1))
        tl.store(codes + row * dim + channel, to_fp8_bytes(x * inverse_power[:, None]), mask=real)
        tl.store(code_scale + row * (dim // _BLOCK) + block, power, mask=block < dim // _BLOCK)


@triton.jit
def mhc_post_kernel(
    streams, row_stride, stream_stride, y, y_stride, post, comb, out, dim, BLOCK: tl.constexpr
):
    """Grid (T, ceil(dim / BLOCK)): the streams after a sub-layer."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (channel < dim)[None, :]
    at = streams + row[:, None] * row_stride + channel[None, :]
    h0 = tl.load(at, mask=real, other=0.0).to(tl.float32)
    h1 = tl.load(at + stream_stride, mask=real, other=0.0).to(tl.float32)
    h2 = tl.load(at + 2 * stream_stride, mask=real, other=0.0).to(tl.float32)
    h3 = tl.load(at + 3 * stream_stride, mask=real, other=0.0).to(tl.float32)
    added = tl.load(y + row[:, None] * y_stride + channel[None, :], mask=real, other=0.0)
    for stream in tl.static_range(4):
        x = _mixed(added.to(tl.float32), h0, h1, h2, h3, post, comb, row, row >= 0, stream)
        tl.store(out + (row[:, None] * 4 + stream) * dim + channel[None, :], to_bf16(x), mask=real)


def _instructions() -> dict[str, int]:
    """The matrix instruction of every tile: the same sums in the same order."""
    return {"matrix_instr_nonkdim": 16} if device.arch().startswith("gfx") else {}


def _project(
    streams: Tensor,
    fn: Tensor,
    y: Tensor | None = None,
    post: Tensor | None = None,
    comb: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(streams after the sub-layer whose output is `y`, or as they are without one; fp32 partial
    mixes and squares [stripes, T, 32])."""
    rows, _, dim = streams.shape
    stripes = triton.cdiv(dim, _STRIPE)
    partial = torch.empty(stripes, rows, _COLUMNS.value, dtype=torch.float32, device=streams.device)
    out = streams if y is None else torch.empty(streams.shape, dtype=y.dtype, device=y.device)
    tile = 2 * _ROWS if rows >= 512 and device.arch().startswith("sm_") else _ROWS
    mhc_project_kernel[(triton.cdiv(rows, tile), stripes)](
        streams,
        streams.stride(0),
        streams.stride(1),
        streams if y is None else y,
        0 if y is None else y.stride(0),
        partial if post is None else post,
        partial if comb is None else comb,
        out,
        fn,
        partial,
        rows,
        dim,
        MIXES=fn.shape[0],
        POST=y is not None,
        ROWS=tile,
        STRIPE=_STRIPE,
        CHANNELS=_CHANNELS,
        num_warps=4,
        num_stages=2,
        **_instructions(),
    )
    return out, partial


def _finish(
    streams: Tensor,
    partial: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    iterations: int,
    eps: float,
    norm_eps: float,
    quantize: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    rows, _, dim = streams.shape
    out = torch.empty(rows, dim, dtype=streams.dtype, device=streams.device)
    codes = torch.empty(rows, dim, dtype=torch.float8_e4m3fn, device=out.device)
    code_scale = partial.new_empty(rows, dim // _BLOCK.value)
    post, comb = partial.new_empty(rows, _STREAMS), partial.new_empty(rows, _STREAMS, _STREAMS)
    blocks = triton.next_power_of_2(triton.cdiv(dim, _BLOCK.value))
    mhc_finish_kernel[(rows,)](
        streams,
        streams.stride(0),
        streams.stride(1),
        partial,
        base,
        scale,
        base if norm_weight is None else norm_weight,
        out,
        codes.view(torch.uint8),
        code_scale,
        post,
        comb,
        rows,
        dim,
        partial.shape[0],
        iterations,
        eps,
        norm_eps,
        MIXES=base.shape[0],
        NORM=norm_weight is not None,
        QUANTIZE=quantize,
        STRIPES=triton.next_power_of_2(partial.shape[0]),
        BLOCKS=blocks,
        num_warps=8 if blocks > 32 else 4,
    )
    return out, codes if quantize else None, code_scale if quantize else None, post, comb


def _nothing(streams: Tensor, quantize: bool) -> tuple:
    """The outputs of a sub-layer's entry for no rows."""
    _, n, dim = streams.shape
    fp32 = {"dtype": torch.float32, "device": streams.device}
    codes = torch.empty(0, dim, dtype=torch.float8_e4m3fn, device=streams.device)
    return (
        streams.new_empty(0, dim),
        codes if quantize else None,
        torch.empty(0, dim // 128, **fp32) if quantize else None,
        torch.empty(0, n, **fp32),
        torch.empty(0, n, n, **fp32),
    )


def mhc_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    quantize: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The operator of the same name for four bf16 streams."""
    if not streams.shape[0]:
        return _nothing(streams, quantize)
    _, partial = _project(streams, fn)
    return _finish(streams, partial, base, scale, norm_weight, iterations, eps, norm_eps, quantize)


def mhc_post_pre(
    y: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    quantize: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The operator of the same name for four bf16 streams."""
    if not streams.shape[0]:
        return streams, *_nothing(streams, quantize)
    streams, partial = _project(streams, fn, y, post, comb)
    return streams, *_finish(
        streams, partial, base, scale, norm_weight, iterations, eps, norm_eps, quantize
    )


def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The operator of the same name for four bf16 streams."""
    rows, _, dim = streams.shape
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    if rows:
        block = min(1024, triton.next_power_of_2(dim))
        mhc_post_kernel[(rows, triton.cdiv(dim, block))](
            streams,
            streams.stride(0),
            streams.stride(1),
            y,
            y.stride(0),
            post,
            comb,
            out,
            dim,
            BLOCK=block,
            num_warps=2,
        )
    return out


def mhc_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """The operator of the same name for four bf16 streams."""
    if not streams.shape[0]:
        return streams.new_empty(0, streams.shape[2])
    _, partial = _project(streams, fn)
    return _finish(streams, partial, base, scale, norm_weight, 0, eps, norm_eps, False)[0]
