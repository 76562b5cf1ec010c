"""RMSNorm and its FP8 in aiter's kernel for the norms of queries and keys, given queries alone."""

from __future__ import annotations

import torch
from aiter.ops.fused_qk_rmsnorm_group_quant import fused_qk_rmsnorm_group_quant
from torch import Tensor

from ..strides import require_dense_rows
from . import require_arguments

require_arguments(fused_qk_rmsnorm_group_quant, "q_out_unquantized", "group_size")


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, keep: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The operator of the same name for bf16 `x` of at most 8,192 channels and a bf16 weight;
    scales are amax / 448, not rounded up to powers of two."""
    require_dense_rows("rms_norm_quant", x=x)
    rows, columns = x.shape
    normed = codes = scales = None
    if keep != "fp8":
        normed = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    if keep != "normed":
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(rows, columns // 128, dtype=torch.float32, device=x.device)
    if rows:
        fused_qk_rmsnorm_group_quant(
            q_out_quantized=codes,
            q_out_scale=scales,
            q=x,
            q_weight=weight,
            q_epsilon=eps,
            q_out_unquantized=normed,
            group_size=128,
        )
    return normed, codes, scales
