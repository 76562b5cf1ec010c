"""Routed experts (docs/model.md §3.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import dense_weight
from ..kernels.flydsl.prepared import PreparedExperts, released
from .block_fp8_linear import linear
from .operator import HERE, Implementation, operator
from .shared_expert import needs_bf16, swiglu

# bounds the gathered matrices of the reference: 64 MiB of fp32
_MAX_GATHERED = 1 << 24


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

    Weights that were prepared for an implementation are a PreparedExperts each; only that one takes
    them, and this definition, which reads them back.
    """
    if isinstance(w1, PreparedExperts):
        w1, w1_scale, w2, w2_scale, w3, w3_scale = released(w1, w2)
    stacks = (w1, w1_scale), (w2, w2_scale), (w3, w3_scale)
    each = _choice_by_choice if HERE.static else _expert_by_expert
    return each(x, weights, experts - first_expert, stacks, swiglu_limit)


_Stacks = tuple[tuple[Tensor, Tensor | None], ...]


def _expert_by_expert(
    x: Tensor, weights: Tensor, experts: Tensor, stacks: _Stacks, limit: float
) -> Tensor:
    """One product for all rows of an expert: the host waits to learn how many they are."""
    y = x.new_zeros(x.shape, dtype=torch.float32)
    held = (experts >= 0) & (experts < stacks[0][0].shape[0])
    for e in experts[held].unique().tolist():
        token, choice = (experts == e).nonzero(as_tuple=True)
        gate_w, down_w, up_w = (
            dense_weight(w[e], None if s is None else s[e], x.dtype) for w, s in stacks
        )
        rows = x.index_select(0, token)
        hidden = swiglu(linear(rows, gate_w), linear(rows, up_w), limit)
        hidden = (hidden * weights[token, choice].unsqueeze(-1)).to(x.dtype)
        y.index_add_(0, token, linear(hidden, down_w).float())
    return y


def _choice_by_choice(
    x: Tensor, weights: Tensor, experts: Tensor, stacks: _Stacks, limit: float
) -> Tensor:
    """The matrices of every choice gathered: all shapes are known before, for steps of few rows."""
    held = (experts >= 0) & (experts < stacks[0][0].shape[0])
    weights, experts = weights.masked_fill(~held, 0.0), experts.masked_fill(~held, 0)
    y = x.new_empty(x.shape, dtype=torch.float32)
    block = max(1, _MAX_GATHERED // (experts.shape[1] * stacks[0][0][0].numel()))
    for start in range(0, x.shape[0], block):
        part = slice(start, start + block)
        chosen = experts[part].flatten()
        gate_w, down_w, up_w = (
            dense_weight(_select(w, chosen), None if s is None else _select(s, chosen), x.dtype)
            for w, s in stacks
        )
        rows = x[part].repeat_interleave(experts.shape[1], 0)
        hidden = swiglu(_products(rows, gate_w), _products(rows, up_w), limit)
        hidden = (hidden * weights[part].reshape(-1, 1)).to(x.dtype)
        y[part] = _products(hidden, down_w).float().unflatten(0, (-1, experts.shape[1])).sum(1)
    return y


def _select(stack: Tensor, at: Tensor) -> Tensor:
    """Rows `at` of a stack; of bytes where torch cannot select the dtype."""
    if stack.dtype != torch.float8_e8m0fnu and stack.dtype != torch.float8_e4m3fn:
        return stack.index_select(0, at)
    return stack.view(torch.uint8).index_select(0, at).view(stack.dtype)


def _products(rows: Tensor, matrices: Tensor) -> Tensor:
    """Each of `rows` [n, in] times its own of `matrices` [n, out, in], in the dtype of the rows."""
    rows_first = rows.to(matrices.dtype).unsqueeze(1)  # six times as fast on a CPU
    return (rows_first @ matrices.transpose(1, 2)).squeeze(1).to(rows.dtype)


def _needs_released(x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, *rest) -> str | None:
    if isinstance(w1, PreparedExperts):
        return "the weights are prepared for flydsl"
    return needs_bf16(x)


def _needs_prepared(x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, *rest) -> str | None:
    if not isinstance(w1, PreparedExperts):
        return "the weights are as released, and were not prepared for it when they were loaded"
    return needs_bf16(x)


moe.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.moe:moe",
        packages=("triton",),
        requires=_needs_released,
    )
)
moe.add(
    Implementation(
        "flydsl",
        "dsv4_plugin.kernels.flydsl.moe:moe",
        packages=("flydsl==0.4.2", "triton"),
        archs=("gfx950",),
        requires=_needs_prepared,
        measured=False,
        prepare="dsv4_plugin.kernels.flydsl.prepared:prepare",
        weights=(3, 9),
    )
)
