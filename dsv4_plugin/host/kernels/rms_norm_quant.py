"""RMSNorm and its FP8 in SGLang's Triton kernel for DeepSeek-V4 on gfx950, which runs wherever
Triton does."""

from __future__ import annotations

from sglang.kernels.ops.layernorm.rmsnorm_fp8_e8m0 import rmsnorm_fp8_e8m0_quant
from torch import Tensor

from ...kernels.strides import require_dense_rows


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, keep: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The operator of the same name for bf16 `x`, for `keep` "fp8" or "both"; scales come as ue8m0
    and are decoded."""
    require_dense_rows("rms_norm_quant", x=x)
    (codes, scale), normed = rmsnorm_fp8_e8m0_quant(x, weight, eps, group_size=128)
    # called [T, blocks], stored block by block
    scales = scale.view(scale.shape[1], scale.shape[0]).t().float().contiguous()
    return normed if keep == "both" else None, codes, scales
