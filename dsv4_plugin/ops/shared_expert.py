"""The expert every token takes, and the clamped SwiGLU all experts share (docs/model.md §3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import dense_weight
from .block_fp8_linear import linear
from .operator import Implementation, operator


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
    """w2(swiglu(x w1ᵀ, x w3ᵀ)) fp32 [T, d] of `x` [T, d]; `w1`, `w3` [I, d], `w2` [d, I], dense or
    FP8. fp32, because it meets the sum over experts and the shares of other processes so."""
    w1, w2, w3 = (
        dense_weight(w, s, x.dtype) for w, s in ((w1, w1_scale), (w2, w2_scale), (w3, w3_scale))
    )
    hidden = swiglu(linear(x, w1), linear(x, w3), swiglu_limit).to(x.dtype)
    return linear(hidden, w2).float()


def needs_bf16(x: Tensor, *rest) -> str | None:
    """What the kernels of experts cannot run."""
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, not bfloat16"
    if x.shape[1] % 128:
        return f"hidden size {x.shape[1]} is not a multiple of 128"
    return None


shared_expert.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.shared_expert:shared_expert",
        packages=("triton",),
        requires=needs_bf16,
    )
)
