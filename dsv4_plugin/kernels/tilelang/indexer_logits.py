"""Scores of the lightning indexer in TileLang, in the two forms that its targets want.

`direct`, gfx950: a wave owns 16 of a page's 64 entries. Its keys are one contiguous read of 2 KiB
that lands as the second operand of the full-rate FP8 product: lane L holds key L % 16, channels
16·g to 16·g + 15 and 64 + those, g = L // 16. The queries are the first operand, in registers for
all of the row's pages. A lane then has heads 16·t + 4·g + v of its key: the sum over heads is in
its own registers and two exchanges. No local memory, no barrier.

`tiled`, gfx942 and sm_90: `T.gemm` of a page in local memory, keys as rows and heads as columns.
gfx942 reads FP8 as FNUZ: the same byte means half the value, and that of -0 is NaN; so that byte is
cleared, and the weights carry the factor 4.

A row's pages are shared evenly by a power of two of programs, which follows from the number of rows
and from the chip: the work is that of the contexts, not of the longest sequence a graph allows.
Offsets into the pool are 64-bit.

Byte floor as in Triton: 132 for every visible entry, 4 for every logit, 132·n for a row of n heads.

Variants: heads.
"""

# No `annotations` from the future: TileLang reads those of the kernels as they are.
import tilelang.language as T
import torch
from torch import Tensor

from ... import device
from ...cache.layout import INDEX_DIM, INDEX_PAGE_ENTRIES, index_page_bytes
from ...cache.step_plan import StepPlan
from ...cache.stores import PackedIndexCache
from ..strides import require_contiguous, require_dense_rows
from .build import Kernel

_THREADS = 256
_AT_ONCE = 2
"""Pages whose loads a wave has under way together."""
_PROGRAMS_A_UNIT = 8
_PAGE = index_page_bytes()
_PAGE_WORDS, _SCALES = _PAGE // 4, INDEX_PAGE_ENTRIES * INDEX_DIM // 4
_PRODUCT = """
#include <hip/hip_runtime.h>
#include <tl_templates/hip/hip_fp8.h>
typedef int dsv4_i32x8 __attribute__((ext_vector_type(8)));
typedef float dsv4_f32x4 __attribute__((ext_vector_type(4)));
// c [16, 16] += a [16, 128] b [16, 128]^T of e4m3, without scales
__device__ __forceinline__ void product_16x16x128(float *c, const void *a, const void *b) {
  *(dsv4_f32x4 *)c = __builtin_amdgcn_mfma_scale_f32_16x16x128_f8f6f4(
      *(const dsv4_i32x8 *)a, *(const dsv4_i32x8 *)b, *(dsv4_f32x4 *)c, 0, 0, 0, 0, 0, 0);
}
// Loads before it are issued before what follows it.
__device__ __forceinline__ void in_order() { __builtin_amdgcn_sched_barrier(0); }
// A value that is wanted whatever follows: its load is not moved into a branch.
__device__ __forceinline__ void wanted(float *x) { asm volatile("" : "+v"(*x)); }
"""


def _relu(x):
    """max(x, 0) by the bits, which is one instruction; a float maximum also quiets NaN."""
    return T.reinterpret(T.max(T.reinterpret(x, "int32"), 0), "float32")


def indexer_logits_direct(heads: int):
    tokens, entries = T.dynamic("tokens"), T.dynamic("entries")
    bytes_, words = T.dynamic("bytes", "int64"), T.dynamic("words", "int64")
    cells = T.dynamic("cells", "int64")
    tiles = -(-heads // 16)

    @T.prim_func
    def indexer_logits(
        q: T.Tensor((tokens, heads, INDEX_DIM), "float8_e4m3fn"),
        weights: T.Tensor((tokens, heads), "float32"),
        keys: T.Tensor((bytes_,), "float8_e4m3fn"),
        key_scales: T.Tensor((words,), "float32"),
        position: T.Tensor((tokens,), "int64"),
        request: T.Tensor((tokens,), "int64"),
        page_table: T.Tensor((cells,), "int64"),
        logits: T.Tensor((tokens, entries), "float32"),
        row_cells: T.int32,
        splits_log2: T.int32,
    ):
        with T.Kernel(tokens, 1 << splits_log2, threads=_THREADS) as (row, split):
            T.import_source(_PRODUCT)
            query = T.alloc_local((tiles, 32), "float8_e4m3fn")
            weight = T.alloc_local((tiles * 4,), "float32")
            key = T.alloc_local((_AT_ONCE, 32), "float8_e4m3fn")
            scale = T.alloc_local((_AT_ONCE,), "float32")
            score = T.alloc_local((tiles, 4), "float32")
            total = T.alloc_local((_AT_ONCE,), "float32")
            thread = T.get_thread_binding()
            lane, wave = thread % 64, thread // 64
            column, group = lane % 16, lane // 16
            entry = wave * 16 + column
            visible = T.cast((position[row] + 1) // 4, "int32")
            pages = T.ceildiv(visible, INDEX_PAGE_ENTRIES)
            share = (pages + (1 << splits_log2) - 1) >> splits_log2
            first = T.alloc_var("int32", init=split * share)
            last = T.alloc_var("int32", init=T.min(pages, (split + 1) * share))
            if first < last:
                for t in T.unroll(tiles):
                    for piece in T.unroll(2):
                        for j in T.vectorized(16):
                            query[t, piece * 16 + j] = q[
                                row,
                                T.min(t * 16 + column, heads - 1),
                                piece * 64 + group * 16 + j,
                            ]
                    for v in T.vectorized(4):
                        head = t * 16 + group * 4 + v
                        weight[t * 4 + v] = T.if_then_else(
                            head < heads, weights[row, T.min(head, heads - 1)], 0.0
                        )
                for step in T.serial(T.ceildiv(last - first, _AT_ONCE)):
                    at = first + step * _AT_ONCE
                    for p in T.unroll(_AT_ONCE):
                        page = page_table[request[row] * row_cells + T.min(at + p, last - 1)]
                        scale[p] = key_scales[page * _PAGE_WORDS + _SCALES + entry]
                        for piece in T.unroll(2):
                            for j in T.vectorized(16):
                                key[p, piece * 16 + j] = keys[
                                    page * _PAGE + entry * INDEX_DIM + piece * 64 + group * 16 + j
                                ]
                    T.call_extern("handle", "in_order")
                    for p in T.unroll(_AT_ONCE):
                        total[p] = 0.0
                        for t in T.unroll(tiles):
                            for v in T.unroll(4):
                                score[t, v] = 0.0
                            T.call_extern(
                                "handle",
                                "product_16x16x128",
                                T.address_of(score[t, 0]),
                                T.address_of(query[t, 0]),
                                T.address_of(key[p, 0]),
                            )
                        T.call_extern("handle", "in_order")  # or each product waits for the last
                        T.call_extern("handle", "wanted", T.address_of(scale[p]))
                        for t in T.unroll(tiles):
                            for v in T.unroll(4):
                                total[p] += _relu(score[t, v]) * weight[t * 4 + v]
                        # the width is 32 where it is not given, also in a wave of 64
                        total[p] += T.shfl_xor(total[p], 16, 64)
                        total[p] += T.shfl_xor(total[p], 32, 64)
                        number = (at + p) * INDEX_PAGE_ENTRIES + entry
                        if (group == 0) & (at + p < last) & (number < visible):
                            logits[row, number] = total[p] * scale[p]

    return indexer_logits


def indexer_logits_tiled(heads: int, fnuz: bool):
    tokens, entries = T.dynamic("tokens"), T.dynamic("entries")
    bytes_, words = T.dynamic("bytes", "int64"), T.dynamic("words", "int64")
    cells = T.dynamic("cells", "int64")
    columns, factor = -(-heads // 16) * 16, 4.0 if fnuz else 1.0
    given, fp8 = ("uint8", "float8_e4m3fnuz") if fnuz else ("float8_e4m3fn", "float8_e4m3fn")

    def operand(x):
        return T.reinterpret(T.if_then_else(x == 0x80, T.uint8(0), x), fp8) if fnuz else x

    @T.prim_func
    def indexer_logits(
        q: T.Tensor((tokens, heads, INDEX_DIM), given),
        weights: T.Tensor((tokens, heads), "float32"),
        keys: T.Tensor((bytes_,), given),
        key_scales: T.Tensor((words,), "float32"),
        position: T.Tensor((tokens,), "int64"),
        request: T.Tensor((tokens,), "int64"),
        page_table: T.Tensor((cells,), "int64"),
        logits: T.Tensor((tokens, entries), "float32"),
        row_cells: T.int32,
        splits_log2: T.int32,
    ):
        with T.Kernel(tokens, 1 << splits_log2, threads=_THREADS) as (row, split):
            query = T.alloc_shared((columns, INDEX_DIM), fp8)
            key = T.alloc_shared((INDEX_PAGE_ENTRIES, INDEX_DIM), fp8)
            score = T.alloc_fragment((INDEX_PAGE_ENTRIES, columns), "float32")
            weight = T.alloc_fragment((columns,), "float32")
            total = T.alloc_fragment((INDEX_PAGE_ENTRIES,), "float32")
            visible = T.cast((position[row] + 1) // 4, "int32")
            pages = T.ceildiv(visible, INDEX_PAGE_ENTRIES)
            share = (pages + (1 << splits_log2) - 1) >> splits_log2
            first = T.alloc_var("int32", init=split * share)
            last = T.alloc_var("int32", init=T.min(pages, (split + 1) * share))
            if first < last:
                for n, c in T.Parallel(columns, INDEX_DIM):
                    query[n, c] = operand(q[row, T.min(n, heads - 1), c])
                for n in T.Parallel(columns):
                    weight[n] = T.if_then_else(
                        n < heads, weights[row, T.min(n, heads - 1)] * factor, 0.0
                    )
                for step in T.serial(last - first):
                    page = page_table[request[row] * row_cells + first + step]
                    for i, c in T.Parallel(INDEX_PAGE_ENTRIES, INDEX_DIM):
                        key[i, c] = operand(keys[page * _PAGE + i * INDEX_DIM + c])
                    T.gemm(
                        key,
                        query,
                        score,
                        transpose_B=True,
                        clear_accum=True,
                        policy=T.GemmWarpPolicy.FullRow,
                    )
                    for i, n in T.Parallel(INDEX_PAGE_ENTRIES, columns):
                        score[i, n] = _relu(score[i, n]) * weight[n]
                    T.reduce_sum(score, total, dim=1)
                    for i in T.Parallel(INDEX_PAGE_ENTRIES):
                        number = (first + step) * INDEX_PAGE_ENTRIES + i
                        if number < visible:
                            logits[row, number] = (
                                total[i] * key_scales[page * _PAGE_WORDS + _SCALES + i]
                            )

    return indexer_logits


DIRECT = Kernel(indexer_logits_direct, checked=False)
TILED = Kernel(indexer_logits_tiled, checked=False)


def _splits_log2(tokens: int, pages: int, q: Tensor) -> int:
    """Programs of a row, as a power of two: enough for the chip, none without two pages of the
    longest sequence."""
    units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 256
    most = max(1, min(units * _PROGRAMS_A_UNIT // tokens, pages // _AT_ONCE))
    return most.bit_length() - 1


def indexer_logits(q: Tensor, weights: Tensor, cache: PackedIndexCache, plan: StepPlan) -> Tensor:
    """The operator of the same name for e4m3 `q` and a packed cache; logits that a row
    does not see stay unwritten."""
    require_contiguous(
        "indexer_logits", q=q, weights=weights, position=plan.position, request=plan.request
    )
    require_contiguous("indexer_logits", pages=cache.pages)
    require_dense_rows("indexer_logits", page_table=plan.page_table)
    tokens, heads, _ = q.shape
    logits = torch.empty(tokens, plan.max_seq_len // 4, dtype=torch.float32, device=q.device)
    if not logits.numel():
        return logits
    arch, table = device.arch(), plan.page_table
    fnuz = arch.startswith("gfx94")
    codes = torch.uint8 if fnuz else torch.float8_e4m3fn
    rows, row_cells = table.shape[0], table.stride(0)
    arguments = (
        q.view(codes),
        weights,
        cache.pages.view(codes).view(-1),
        cache.pages.view(torch.float32).view(-1),
        plan.position,
        plan.request,
        table.as_strided(((rows - 1) * row_cells + table.shape[1],), (1,)),
        logits,
        row_cells,
        _splits_log2(tokens, table.shape[1], q),
    )
    if arch == "gfx950":
        DIRECT(*arguments, heads=heads)
    else:
        TILED(*arguments, heads=heads, fnuz=fnuz)
    return logits
