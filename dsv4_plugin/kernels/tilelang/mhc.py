"""Hyper-connections in TileLang: what a sub-layer reads of four residual streams, and their mixing
with what it returns.

`project` takes 32 rows and 128 channels of all four streams: their products with `fn`, and their
squares. Streams are bf16 and an fp32 weight is the exact sum of three bf16 numbers (24 = 3 · 8
bits), so bf16 products are exact and fp32 sums are the only error; CDNA has no TF32, and T.gemm of
fp32 does not lower there. `finish` takes a row: it adds the stripes, runs Sinkhorn on its 4x4 in
the registers of every lane, collapses the streams, norms and quantises. Tiles and stripes do not
depend on the number of rows: a row has the same bits in any batch.

Byte floors are those of kernels/triton/mhc.py.

Variants: channels, constants of the model, whether FP8 is wanted, the dtype of the norm's weight.
"""

# No `annotations` from the future: TileLang reads those of the kernels as they are.
import tilelang.language as T
import torch
from torch import Tensor

from ..strides import require_contiguous, require_dense_rows
from .build import Kernel

_STREAMS, _MIXES = 4, 24
_ROWS, _STRIPE = 32, 128
_COLUMNS = 32
"""Of a stripe's partial result: the mixes, the sum of squares after them, padding."""
_BLOCK = 128
_THREADS = 256
_VECTOR = 8
"""Elements of a wide load: strides come in this unit, so that TileLang knows them to be aligned."""
_POST_CHANNELS = 1024


def mhc_project_kernel(dim: int):
    rows, size = T.dynamic("rows"), T.dynamic("size", "int64")

    @T.prim_func
    def mhc_project(
        streams: T.Tensor((size,), "bfloat16"),
        fn: T.Tensor((_MIXES, _STREAMS * dim), "float32"),
        partial: T.Tensor((dim // _STRIPE, rows, _COLUMNS), "float32"),
        row_vectors: T.int32,
        stream_vectors: T.int32,
    ):
        with T.Kernel(T.ceildiv(rows, _ROWS), dim // _STRIPE, threads=_THREADS) as (block, stripe):
            x = T.alloc_shared((_ROWS, _STRIPE), "bfloat16")
            weight = T.alloc_shared((3 * _COLUMNS, _STRIPE), "bfloat16")
            total = T.alloc_fragment((_ROWS, 3 * _COLUMNS), "float32")
            square = T.alloc_fragment((_ROWS, _STRIPE), "float32")
            norm = T.alloc_fragment((_ROWS,), "float32")
            terms = T.alloc_shared((_ROWS, 3 * _COLUMNS), "float32")
            T.clear(total)
            T.clear(square)
            for stream in T.serial(_STREAMS):
                for r, c in T.Parallel(_ROWS, _STRIPE):
                    row = T.cast(T.min(block * _ROWS + r, rows - 1), "int64")
                    vectors = row * row_vectors + stream * stream_vectors
                    x[r, c] = streams[vectors * _VECTOR + stripe * _STRIPE + c]
                for m, c in T.Parallel(_COLUMNS, _STRIPE):
                    w = fn[T.min(m, _MIXES - 1), stream * dim + stripe * _STRIPE + c]
                    high = T.cast(w, "bfloat16")
                    rest = w - T.cast(high, "float32")
                    middle = T.cast(rest, "bfloat16")
                    weight[m, c] = high
                    weight[_COLUMNS + m, c] = middle
                    weight[2 * _COLUMNS + m, c] = T.cast(
                        rest - T.cast(middle, "float32"), "bfloat16"
                    )
                T.gemm(x, weight, total, transpose_B=True, k_pack=2)
                for r, c in T.Parallel(_ROWS, _STRIPE):
                    square[r, c] += T.cast(x[r, c], "float32") * T.cast(x[r, c], "float32")
            T.reduce_sum(square, norm, dim=1)
            T.copy(total, terms)
            for r, m in T.Parallel(_ROWS, _COLUMNS):
                if (block * _ROWS + r < rows) & (m != _MIXES):
                    partial[stripe, block * _ROWS + r, m] = (
                        terms[r, m] + terms[r, _COLUMNS + m] + terms[r, 2 * _COLUMNS + m]
                    )
            for r in T.Parallel(_ROWS):
                if block * _ROWS + r < rows:
                    partial[stripe, block * _ROWS + r, _MIXES] = norm[r]

    return mhc_project


def _exponent(amax):
    """Biased exponent of the power of two 2^ceil(log2(amax / 448)): 448 = 1.75 · 2^8, so one more
    above a mantissa of 1.75."""
    bits = T.reinterpret(T.max(amax, 1e-4), "int32")
    return (bits >> 23) - 8 + T.if_then_else((bits & 0x7FFFFF) > 0x600000, 1, 0)


def _e4m3(x):
    """e4m3 code of fp32 |x| <= 448, to nearest even, on the bits: the FP8 vectors that TileLang
    casts to have no elements in HIP. Below 2^-6 the spacing is 2^-9, that of fp32 at 2^14."""
    bits = T.reinterpret(x, "int32")
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    size = T.reinterpret(magnitude, "float32")
    subnormal = T.reinterpret(size + 16384.0, "int32") - 0x46800000
    code = T.if_then_else(magnitude < (121 << 23), subnormal, normal)
    return T.cast(code | ((bits >> 24) & 0x80), "uint8")


def mhc_finish_kernel(
    dim: int,
    iterations: int,
    eps: float,
    norm_eps: float,
    quantize: bool,
    weight_dtype: str,
):
    rows, size = T.dynamic("rows"), T.dynamic("size", "int64")
    stripes, blocks = dim // _STRIPE, dim // _BLOCK
    padded = 1 << (stripes - 1).bit_length()

    @T.prim_func
    def mhc_finish(
        streams: T.Tensor((size,), "bfloat16"),
        partial: T.Tensor((stripes, rows, _COLUMNS), "float32"),
        base: T.Tensor((_MIXES,), "float32"),
        scale: T.Tensor((3,), "float32"),
        norm_weight: T.Tensor((dim,), weight_dtype),
        out: T.Tensor((rows, dim), "bfloat16"),
        codes: T.Tensor((rows, dim), "uint8"),
        code_scale: T.Tensor((rows, blocks), "float32"),
        post: T.Tensor((rows, _STREAMS), "float32"),
        comb: T.Tensor((rows, _STREAMS * _STREAMS), "float32"),
        row_vectors: T.int32,
        stream_vectors: T.int32,
    ):
        with T.Kernel(rows, threads=_THREADS) as row:
            part = T.alloc_fragment((padded, _COLUMNS), "float32")
            sums = T.alloc_fragment((_COLUMNS,), "float32")
            mixes = T.alloc_shared((_COLUMNS,), "float32")
            pre = T.alloc_local((_STREAMS,), "float32")
            # indices are constants once unrolled, or this would be scratch memory
            c = T.alloc_local((_STREAMS, _STREAMS), "float32")
            line = T.alloc_local((1,), "float32")
            x = T.alloc_fragment((blocks, _BLOCK), "float32")
            square = T.alloc_fragment((blocks, _BLOCK), "float32")
            block_sum = T.alloc_fragment((blocks,), "float32")
            norm = T.alloc_fragment((1,), "float32")
            amax = T.alloc_fragment((blocks,), "float32")
            thread = T.get_thread_binding()
            for s, m in T.Parallel(padded, _COLUMNS):
                part[s, m] = T.if_then_else(
                    s < stripes, partial[T.min(s, stripes - 1), row, m], 0.0
                )
            T.reduce_sum(part, sums, dim=0)
            T.copy(sums, mixes)
            factor = T.rsqrt(mixes[_MIXES] / (_STREAMS * dim) + norm_eps)
            for j in T.unroll(_STREAMS):
                pre[j] = 1.0 / (1.0 + T.exp(-(mixes[j] * factor * scale[0] + base[j]))) + eps
                for k in T.unroll(_STREAMS):
                    at = 2 * _STREAMS + _STREAMS * j + k
                    c[j, k] = mixes[at] * factor * scale[2] + base[at]
            for j in T.unroll(_STREAMS):
                line[0] = T.max(T.max(c[j, 0], c[j, 1]), T.max(c[j, 2], c[j, 3]))
                for k in T.unroll(_STREAMS):
                    c[j, k] = T.exp(c[j, k] - line[0])
                line[0] = 1.0 / (c[j, 0] + c[j, 1] + c[j, 2] + c[j, 3])
                for k in T.unroll(_STREAMS):
                    c[j, k] = c[j, k] * line[0] + eps
            for k in T.unroll(_STREAMS):
                line[0] = 1.0 / (c[0, k] + c[1, k] + c[2, k] + c[3, k] + eps)
                for j in T.unroll(_STREAMS):
                    c[j, k] *= line[0]
            for _ in T.serial(iterations - 1):
                for j in T.unroll(_STREAMS):
                    line[0] = 1.0 / (c[j, 0] + c[j, 1] + c[j, 2] + c[j, 3] + eps)
                    for k in T.unroll(_STREAMS):
                        c[j, k] *= line[0]
                for k in T.unroll(_STREAMS):
                    line[0] = 1.0 / (c[0, k] + c[1, k] + c[2, k] + c[3, k] + eps)
                    for j in T.unroll(_STREAMS):
                        c[j, k] *= line[0]
            if thread == 0:
                for j in T.unroll(_STREAMS):
                    at = _STREAMS + j
                    post[row, j] = 2.0 / (1.0 + T.exp(-(mixes[at] * factor * scale[1] + base[at])))
                    for k in T.unroll(_STREAMS):
                        comb[row, _STREAMS * j + k] = c[j, k]
            for b, i in T.Parallel(blocks, _BLOCK):
                at = T.cast(row, "int64") * row_vectors * _VECTOR + b * _BLOCK + i
                step = stream_vectors * _VECTOR
                u = (
                    pre[0] * T.cast(streams[at], "float32")
                    + pre[1] * T.cast(streams[at + step], "float32")
                    + pre[2] * T.cast(streams[at + 2 * step], "float32")
                    + pre[3] * T.cast(streams[at + 3 * step], "float32")
                )
                x[b, i] = T.cast(T.cast(u, "bfloat16"), "float32")
            for b, i in T.Parallel(blocks, _BLOCK):
                square[b, i] = x[b, i] * x[b, i]
            T.reduce_sum(square, block_sum, dim=1)
            T.reduce_sum(block_sum, norm, dim=0)
            for b, i in T.Parallel(blocks, _BLOCK):
                inverse = T.rsqrt(norm[0] / dim + norm_eps)
                weighed = x[b, i] * inverse * T.cast(norm_weight[b * _BLOCK + i], "float32")
                x[b, i] = T.cast(T.cast(weighed, "bfloat16"), "float32")
            for b, i in T.Parallel(blocks, _BLOCK):
                out[row, b * _BLOCK + i] = T.cast(x[b, i], "bfloat16")
            if quantize:
                T.reduce_absmax(x, amax, dim=1)
                for b, i in T.Parallel(blocks, _BLOCK):
                    inverse_power = T.reinterpret((254 - _exponent(amax[b])) << 23, "float32")
                    codes[row, b * _BLOCK + i] = _e4m3(x[b, i] * inverse_power)
                for b in T.Parallel(blocks):
                    code_scale[row, b] = T.reinterpret(_exponent(amax[b]) << 23, "float32")

    return mhc_finish


def mhc_post_kernel(dim: int):
    rows, size, y_size = T.dynamic("rows"), T.dynamic("size", "int64"), T.dynamic("y_size", "int64")

    @T.prim_func
    def mhc_post(
        y: T.Tensor((y_size,), "bfloat16"),
        streams: T.Tensor((size,), "bfloat16"),
        post: T.Tensor((rows, _STREAMS), "float32"),
        comb: T.Tensor((rows, _STREAMS * _STREAMS), "float32"),
        out: T.Tensor((rows, _STREAMS, dim), "bfloat16"),
        y_vectors: T.int32,
        row_vectors: T.int32,
        stream_vectors: T.int32,
    ):
        with T.Kernel(rows, T.ceildiv(dim, _POST_CHANNELS), threads=_POST_CHANNELS // _VECTOR) as (
            row,
            part,
        ):
            for i in T.Parallel(_POST_CHANNELS):
                channel = part * _POST_CHANNELS + i
                if channel < dim:
                    at = T.cast(row, "int64") * row_vectors * _VECTOR + channel
                    step = stream_vectors * _VECTOR
                    added = T.cast(
                        y[T.cast(row, "int64") * y_vectors * _VECTOR + channel], "float32"
                    )
                    for k in T.unroll(_STREAMS):
                        out[row, k, channel] = T.cast(
                            post[row, k] * added
                            + comb[row, k] * T.cast(streams[at], "float32")
                            + comb[row, 4 + k] * T.cast(streams[at + step], "float32")
                            + comb[row, 8 + k] * T.cast(streams[at + 2 * step], "float32")
                            + comb[row, 12 + k] * T.cast(streams[at + 3 * step], "float32"),
                            "bfloat16",
                        )

    return mhc_post


PROJECT = Kernel(mhc_project_kernel, checked=False)
FINISH = Kernel(mhc_finish_kernel, checked=False)
POST = Kernel(mhc_post_kernel, checked=False)


def _flat(operator: str, name: str, tensor: Tensor) -> tuple[Tensor, list[int]]:
    """All elements from the first to the last of `tensor`, in one dimension, and the strides of its
    other dimensions than the last in units of _VECTOR. Raises ValueError for rows that a wide load
    cannot begin at."""
    require_dense_rows(operator, **{name: tensor})
    strides = tensor.stride()[:-1]
    if any(stride % _VECTOR for stride in strides):
        raise ValueError(
            f"{operator}: {name} {list(tensor.shape)} has strides {list(tensor.stride())}, but the"
            f" kernel reads {_VECTOR} elements at once; give it one whose strides are multiples"
        )
    size = 1 + sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride()))
    return tensor.as_strided((size,), (1,)), [stride // _VECTOR for stride in strides]


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
    require_contiguous("mhc_pre", fn=fn, base=base, scale=scale, norm_weight=norm_weight)
    rows, n, dim = streams.shape
    fp32 = {"dtype": torch.float32, "device": streams.device}
    out = torch.empty(rows, dim, dtype=streams.dtype, device=streams.device)
    codes = torch.empty(rows, dim, dtype=torch.float8_e4m3fn, device=streams.device)
    code_scale = torch.empty(rows, dim // _BLOCK, **fp32)
    post, comb = torch.empty(rows, n, **fp32), torch.empty(rows, n, n, **fp32)
    if rows:
        flat, vectors = _flat("mhc_pre", "streams", streams)
        partial = torch.empty(dim // _STRIPE, rows, _COLUMNS, **fp32)
        PROJECT(flat, fn, partial, *vectors, dim=dim)
        FINISH(
            flat,
            partial,
            base,
            scale,
            norm_weight,
            out,
            codes.view(torch.uint8),
            code_scale,
            post,
            comb.view(rows, n * n),
            *vectors,
            dim=dim,
            iterations=iterations,
            eps=eps,
            norm_eps=norm_eps,
            quantize=quantize,
            weight_dtype=str(norm_weight.dtype).removeprefix("torch."),
        )
    return out, codes if quantize else None, code_scale if quantize else None, post, comb


def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The operator of the same name for four bf16 streams."""
    require_contiguous("mhc_post", post=post, comb=comb)
    rows, n, dim = streams.shape
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    if rows:
        flat, vectors = _flat("mhc_post", "streams", streams)
        flat_y, y_vectors = _flat("mhc_post", "y", y)
        POST(flat_y, flat, post, comb.view(rows, n * n), out, *y_vectors, *vectors, dim=dim)
    return out


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
    """The operator of the same name, as mhc_post and then mhc_pre: the streams are read once more
    than fused kernels read them."""
    streams = mhc_post(y, streams, post, comb)
    return streams, *mhc_pre(
        streams, fn, base, scale, norm_weight, iterations, eps, norm_eps, quantize
    )
