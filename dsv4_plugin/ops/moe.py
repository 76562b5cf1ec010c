"""Routed experts (docs/model.md §3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import dense_weight
from .operator import Implementation, operator
from .shared_expert import needs_bf16, swiglu


@operator
def moe(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w1: Tensor,
    w1_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    w3: Tensor,
    w3_scale: Tensor | None,
    swiglu_limit: float,
    first_expert: int = 0,
) -> Tensor:
    """Sum over a token's experts of weight · expert(x): fp32 [T, d].

    `x` [T, d]; `weights` fp32 and `experts` int64 [T, topk]; `w1`, `w3` [E, I, d] and `w2` [E, d,
    I] hold experts `first_expert` .. `first_expert` + E - 1, dense or packed FP4/FP8 with scales;
    other experts contribute nothing. The weight multiplies before `w2`, where rounding sees it.
    """
    y = x.new_zeros(x.shape, dtype=torch.float32)
    local = experts - first_expert
    for e in local[(local >= 0) & (local < w1.shape[0])].unique().tolist():
        token, choice = (local == e).nonzero(as_tuple=True)
        gate_w, down_w, up_w = (
            dense_weight(w[e], None if s is None else s[e], x.dtype)
            for w, s in ((w1, w1_scale), (w2, w2_scale), (w3, w3_scale))
        )
        rows = x[token]
        hidden = swiglu(F.linear(rows, gate_w), F.linear(rows, up_w), swiglu_limit)
        hidden = (hidden * weights[token, choice].unsqueeze(-1)).to(x.dtype)
        y.index_add_(0, token, F.linear(hidden, down_w).float())
    return y


moe.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.moe:moe",
        packages=("triton",),
        requires=needs_bf16,
    )
)
