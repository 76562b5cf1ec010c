"""Routed experts in five launches: rows grouped by expert, rows rounded to FP8 where the form does
so, both products, and each token's sum in the order of its choices.

No length comes back to the CPU and nothing is added with atomics: a step can be captured, and a
token's sum has the same bits whatever else is in the batch. Byte floor: the matrices of the experts
that are touched once, 2·d a token read, 4·d written. 6·d·I operations a pair.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..strides import require_contiguous
from .expert_kernels import sum_kernel
from .experts import both_products, form_of, tiles_of
from .grouping import group_by_expert

_SUMMED = 1024  # channels of a program of the sum


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
    """The operator of the same name for bf16 `x` and weights as released, or dense bf16.

    Raises ValueError for an intermediate size that FP4's blocks of 32 do not divide.
    """
    tokens, wide = x.shape
    held, topk = w1.shape[0], experts.shape[1]
    if w1.shape[1] % 32:
        raise ValueError(f"intermediate size {w1.shape[1]} is not a multiple of 32")
    out = torch.empty(tokens, wide, dtype=torch.float32, device=x.device)
    if not tokens:
        return out
    form = form_of(w1, w1_scale)
    tiles = tiles_of(form, experts.numel() / held)
    require_contiguous("moe", weights=weights, experts=experts)
    groups = group_by_expert(experts, first_expert, held, tiles.rows)
    parts = both_products(
        x,
        w1,
        w1_scale,
        w2,
        w2_scale,
        w3,
        w3_scale,
        swiglu_limit,
        form,
        tiles,
        topk,
        groups,
        weights,
    )
    sum_kernel[(tokens, triton.cdiv(wide, _SUMMED))](
        parts,
        experts,
        out,
        first_expert,
        EXPERTS=held,
        WIDTH=wide,
        TOPK=topk,
        BLOCK=_SUMMED,
        num_warps=4,
    )
    return out
