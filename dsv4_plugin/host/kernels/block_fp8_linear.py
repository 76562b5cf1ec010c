"""Products with 128x128-scaled FP8 weights in SGLang's Triton kernel."""

from __future__ import annotations

import torch
from sglang.kernels.ops.gemm.fp8_kernel import w8a8_block_fp8_matmul_triton
from sglang.kernels.ops.quantization.act_quant_triton import act_quant
from torch import Tensor

from ...kernels.strides import require_contiguous


def block_fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    x_scale: Tensor | None = None,
    parts: tuple[int, ...] = (),
) -> Tensor | tuple[Tensor, ...]:
    """The operator of the same name for a packed weight; bf16 `x` is rounded to FP8 in a launch
    before, parts are copied out of one result."""
    require_contiguous("block_fp8_linear", x=x, weight=weight)
    if not x.shape[0]:
        y = torch.empty(0, weight.shape[0], dtype=torch.bfloat16, device=x.device)
    else:
        if x_scale is None:
            x, x_scale = act_quant(x, block_size=128, scale_fmt="ue8m0")
        y = w8a8_block_fp8_matmul_triton(
            x, weight, x_scale, scale.float(), block_size=[128, 128], output_dtype=torch.bfloat16
        )
    return tuple(part.contiguous() for part in y.split(parts, -1)) if parts else y
