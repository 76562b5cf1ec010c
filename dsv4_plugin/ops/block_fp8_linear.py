"""Matrix product with a released FP8 weight (docs/model.md §2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..formats import dense_weight
from .operator import operator


@operator
def block_fp8_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x Wᵀ [T, out] in the dtype of `x` [T, in].

    `weight` is dense [out, in] in the dtype of `x` when `scale` is None, else float8_e4m3fn with
    128×128 block scales. An implementation may also quantise `x` to FP8 per token in blocks of 128,
    as the released recipe does.
    """
    return F.linear(x, dense_weight(weight, scale, x.dtype))


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ with fp32 accumulation and an fp32 result, for projections that docs/model.md §6 keeps
    in fp32."""
    return F.linear(x.float(), weight.float())
