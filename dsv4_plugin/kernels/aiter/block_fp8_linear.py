"""Products with 128x128-scaled FP8 weights in aiter's Composable Kernel GEMM."""

from __future__ import annotations

import torch
from aiter.ops.gemm_op_a8w8 import gemm_a8w8_blockscale
from aiter.ops.quant import per_group_quant_hip
from torch import Tensor

from ..strides import require_contiguous


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
            x, x_scale = per_group_quant_hip(x, quant_dtype=torch.float8_e4m3fn, group_size=128)
        y = gemm_a8w8_blockscale(x, weight, x_scale, scale.float(), dtype=torch.bfloat16)
    return tuple(part.contiguous() for part in y.split(parts, -1)) if parts else y
