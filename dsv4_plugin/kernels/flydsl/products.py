"""The launch of an expert's products, whichever kernel makes them."""

# FlyDSL reads annotations as the types they are: no `from __future__ import annotations` here.

from . import expert_kernels, row_kernels
from .expert_kernels import WAVES, expert_kernel
from .fp8_kernels import expert_fp8_kernel
from .language import flyc, fx
from .row_kernels import expert_rows_kernel

FEW_ROWS, MANY_ROWS, FP8 = range(3)
ROWS = (expert_kernels.ROWS, row_kernels.ROWS, expert_kernels.ROWS)
"""Of a block, by form."""


@flyc.jit
def expert_product(
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
    blocks: fx.Int32,
    width: fx.Constexpr[int],
    inputs: fx.Constexpr[int],
    topk: fx.Constexpr[int],
    gate_up: fx.Constexpr[bool],
    form: fx.Constexpr[int],
    stream: fx.Stream,
):
    kernel = (expert_kernel, expert_rows_kernel, expert_fp8_kernel)[form]
    kernel(
        x, x_scales, data, scales, pairs, owners, routing, out, out_scales, pair_count, limit,
        width, inputs, topk, gate_up,
    ).launch(
        grid=(width // 128 if gate_up else -(-width // 256), blocks, 1),
        block=(64 * WAVES, 1, 1),
        stream=stream,
    )  # fmt: skip
