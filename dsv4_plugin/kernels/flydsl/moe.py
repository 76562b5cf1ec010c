"""Routed experts in five launches, both products in FlyDSL: rows grouped by expert and rounded to
FP8, the products of expert_kernels.py or, where experts have many rows, of row_kernels.py, those of
FP8 weights of fp8_kernels.py, each token's sum in the order of its choices.

Byte floor: the matrices of the experts that are touched once for 16 or 64 rows of each, 2·d a token
read, 4·d written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..strides import require_contiguous
from ..triton.expert_kernels import sum_kernel
from ..triton.experts import quantise_rows
from ..triton.grouping import group_by_expert
from . import products
from .prepared import DOWN, FP4_LAYOUT, FP8_LAYOUT, GATE_UP, PreparedExperts

_SUMMED = 1024  # channels of a program of the sum
_MANY = 2 * products.ROWS[products.FEW_ROWS]
"""Rows an expert, were they shared out evenly, from which blocks of 64 read weights less often than
their padding costs."""


def moe(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w1: PreparedExperts,
    w1_scale: None,
    w2: PreparedExperts,
    w2_scale: None,
    w3: PreparedExperts,
    w3_scale: None,
    swiglu_limit: float,
    first_expert: int = 0,
) -> Tensor:
    """The operator of the same name for bf16 `x` and prepared weights: `w1` and `w3` are gate and
    up together, `w2` is down. Raises LayoutError for weights in another order."""
    w1.require(GATE_UP, FP4_LAYOUT, FP8_LAYOUT)
    w2.require(DOWN, w1.layout)
    require_contiguous("moe", x=x, weights=weights, experts=experts)
    (tokens, wide), (held, _, inner), topk = x.shape, w2.shape, experts.shape[1]
    out = torch.empty(tokens, wide, dtype=torch.float32, device=x.device)
    if not tokens:
        return out
    pairs = tokens * topk
    if w1.layout == FP8_LAYOUT:
        form = products.FP8
    else:
        form = products.MANY_ROWS if pairs >= _MANY * held else products.FEW_ROWS
    groups = group_by_expert(experts, first_expert, held, products.ROWS[form])
    codes, scales = quantise_rows(x)
    if scales.shape[1] % 4:  # a word of four steps' scales; every released size has whole ones
        scales = F.pad(scales, (0, -scales.shape[1] % 4))
    hidden = codes.new_empty(pairs, inner)
    hidden_scales = codes.new_empty(pairs, triton.cdiv(inner, 512) * 4)
    parts = torch.empty(pairs, wide, dtype=torch.bfloat16, device=x.device)
    stream = torch.cuda.current_stream().cuda_stream if x.device.type == "cuda" else None
    for values, of, made, made_scales, width, inputs in (
        ((codes, scales), w1, hidden, hidden_scales, inner, wide),
        ((hidden, hidden_scales), w2, parts, hidden_scales, wide, inner),
    ):
        products.expert_product(
            *values,
            of.data,
            of.scales,
            groups.pairs,
            groups.experts,
            weights,
            made,
            made_scales,
            pairs,
            swiglu_limit,
            groups.experts.numel(),
            width,
            inputs,
            topk,
            of is w1,
            form,
            stream=stream,
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
