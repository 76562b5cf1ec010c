"""RMSNorm, optionally followed by FP8 quantisation for the next matrix product (docs/model.md §3,
§6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import quantize_fp8
from .operator import operator


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x²) + eps) * weight over the last dimension, in fp32, in the dtype of `x`."""
    y = x.float()
    return torch.rms_norm(y, y.shape[-1:], None if weight is None else weight.float(), eps).to(
        x.dtype
    )


@operator
def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of `x` [T, n] and its per-token FP8 in blocks of 128: (normed [T, n], e4m3 [T, n],
    fp32 scale [T, n/128])."""
    y = rms_norm(x, weight, eps)
    return y, *quantize_fp8(y, 128)
