"""The expert every token takes, and the clamped SwiGLU all experts share (docs/model.md §3.5)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..formats import dense_weight
from .operator import operator


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) · clamp(up, -limit, limit), fp32."""
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


@operator
def shared_expert(
    x: Tensor,
    w1: Tensor,
    w1_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    w3: Tensor,
    w3_scale: Tensor | None,
    swiglu_limit: float,
) -> Tensor:
    """w2(swiglu(x w1ᵀ, x w3ᵀ)) [T, d] in the dtype of `x` [T, d]; `w1`, `w3` [I, d], `w2` [d, I],
    dense or FP8."""
    w1, w2, w3 = (
        dense_weight(w, s, x.dtype) for w, s in ((w1, w1_scale), (w2, w2_scale), (w3, w3_scale))
    )
    return F.linear(swiglu(F.linear(x, w1), F.linear(x, w3), swiglu_limit).to(x.dtype), w2)
