"""How far an implementation of an operator is from its reference, and how far it may be.

Shared by `dsv4 verify`, which makes its own data, and by the probe, which takes the data of the
loaded model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.step_plan import StepPlan
from ..formats import dequantize_fp8
from ..ops.operator import OPERATORS, Operator


@dataclass(frozen=True)
class Tolerance:
    """The largest error allowed, and why that much."""

    limit: float
    why: str


SAME = Tolerance(0.0, "integers: must be equal")
FP32 = Tolerance(
    1e-4,
    "fp32 sums of up to 2^15 terms in another order: 2^-24 a term, some hundred times that in the"
    " worst row",
)
BF16 = Tolerance(
    2e-2, "ten roundings to bf16 (2^-9 each) that an implementation may place elsewhere"
)
FP8_SUMS = Tolerance(
    2**-11,
    "products of e4m3 are exact, but some matrix units (sm_90) keep 14 bits of their sums: 2^-13 of"
    " the largest partial sum, four times that in the worst row",
)
FP8 = Tolerance(
    6e-2, "inputs may be rounded to e4m3, which moves a row by 2^-5; twice that in the worst row"
)
FP8_TWICE = Tolerance(
    9e-2,
    "inputs of both products of an expert may be rounded to e4m3: gate, up and hidden values move"
    " by 2.6 % each, a row by 4.5 %; twice that in the worst row",
)

_DISCRETE = {"topk_select", "build_step_plan", "sample_greedy"}
_FP8_INPUTS = {"block_fp8_linear"}
"""Operators whose implementations may round their inputs to FP8, as their references say."""
_FP8_INPUTS_TWICE = {"moe", "shared_expert", "grouped_output"}
"""The same for two products in a row, or one whose result is rounded for the next."""
_FP8_OUTPUTS = {
    "qk_norm_rope_store",
    "compress",
    "rope_hadamard_quant",
    "rms_norm_quant",
    "mhc_pre",
    "mhc_post_pre",
}
"""Operators that store FP8: a value at the border of two codes may take either."""


def tolerance(operator: str, dtype: torch.dtype) -> Tolerance:
    """What `operator` may be off for a first tensor of `dtype`."""
    if operator in _DISCRETE:
        return SAME
    if operator == "indexer_logits":
        return FP8_SUMS
    if operator in _FP8_INPUTS_TWICE:
        return FP8_TWICE
    if operator in _FP8_INPUTS | _FP8_OUTPUTS:
        return FP8
    return BF16 if dtype == torch.bfloat16 else FP32


def error(got: Tensor, want: Tensor) -> float:
    """The largest over rows of |got - want| / |want| (Euclidean), rows that are nearly 0 measured
    by the largest row.

    Only what is finite in `want` counts; anything not finite against it is infinitely wrong.
    Integers that differ at all are infinitely wrong.
    """
    if got.shape != want.shape:
        return float("inf")
    if not want.dtype.is_floating_point:
        return 0.0 if torch.equal(got.to(want.dtype), want) else float("inf")
    if not want.numel():
        return 0.0
    rows = (want.shape[0], -1) if want.dim() > 1 else (1, -1)
    got, want = got.double().reshape(rows), want.double().reshape(rows)
    known = want.isfinite()
    if not got[known].isfinite().all():
        return float("inf")
    difference = (got - want).masked_fill(~known, 0.0).norm(dim=1)
    size = want.masked_fill(~known, 0.0).norm(dim=1)
    scale = size.clamp_min(1e-3 * float(size.max())).clamp_min(torch.finfo(torch.float32).tiny)
    return float((difference / scale).max())


def bound(operator: Operator, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The call's arguments by name."""
    return inspect.signature(operator.reference).bind(*args, **kwargs).arguments


def outcome(operator: Operator, result: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Everything a call produced that is defined, by name: what it returned and what it wrote."""
    view = _VIEWS.get(operator.name)
    if view is not None:
        return view(result, arguments)
    values = result if isinstance(result, tuple) else (result,)
    return {
        f"output {index}" if len(values) > 1 else "output": value.clone()
        for index, value in enumerate(values)
        if value is not None
    }


def mutable(operator: Operator, arguments: dict[str, Any]) -> list[Tensor]:
    """Tensors that a call both reads and writes: restored between two runs on the same
    arguments."""
    return [arguments["ring"]] if operator.name == "compress" else []


def errors(
    operator: Operator, run: Callable[..., Any], args: tuple, kwargs: dict
) -> tuple[Any, dict[str, float]]:
    """(the result of `run`, the error of each thing it produced against the reference on the same
    arguments)."""
    arguments = bound(operator, args, kwargs)
    states = mutable(operator, arguments)
    before = [state.clone() for state in states]
    want = outcome(operator, operator.reference(*args, **kwargs), arguments)
    for state, saved in zip(states, before):
        state.copy_(saved)
    result = run(*args, **kwargs)
    got = outcome(operator, result, arguments)
    return result, {name: error(got[name], want[name]) for name in want}


def _stored(result: Tensor, a: dict[str, Any]) -> dict[str, Tensor]:
    return {"queries": result.clone(), "cache": a["cache"].load(a["slots"])}


def _compressed(result: None, a: dict[str, Any]) -> dict[str, Tensor]:
    rows = a["rows"]
    kept = rows.ring_write_row[rows.ring_write_row >= 0]
    return {"cache": a["cache"].load(rows.slots[rows.token >= 0]), "ring": a["ring"][kept].clone()}


def _codes(values: Tensor | None, scale: Tensor | None, name: str) -> dict[str, Tensor]:
    """What FP8 `values` with `scale` stand for, where a call gave them."""
    return {} if values is None else {name: dequantize_fp8(values, scale)}


def _quantised(result: tuple, a: dict[str, Any]) -> dict[str, Tensor]:
    normed, values, scale = result
    return ({} if normed is None else {"normed": normed}) | _codes(values, scale, "fp8")


def _grouped(result: Any, a: dict[str, Any]) -> dict[str, Tensor]:
    return _codes(*result, "output") if isinstance(result, tuple) else {"output": result.clone()}


def _entered(result: tuple, a: dict[str, Any]) -> dict[str, Tensor]:
    *streams, x, values, scale, post, comb = result
    found = {"input": x.clone(), "post": post.clone(), "comb": comb.clone()}
    if streams:
        found["streams"] = streams[0].clone()
    return found | _codes(values, scale, "fp8")


def _index_queries(result: tuple[Tensor, Tensor], a: dict[str, Any]) -> dict[str, Tensor]:
    q, weights = result
    return {"weighted queries": q.float() * weights.unsqueeze(-1)}


def _seen_logits(result: Tensor, a: dict[str, Any]) -> dict[str, Tensor]:
    entries = torch.arange(result.shape[1], device=result.device)
    unseen = entries >= a["plan"].visible(4).unsqueeze(-1)
    # The terms of a logit cancel and their roundings do not: a column says how large they are.
    sums = OPERATORS["indexer_logits"].reference(**a | {"weights": a["weights"].abs()})
    size = sums.masked_fill(unseen, 0.0).norm(dim=1, keepdim=True)
    return {"logits": torch.cat([result.masked_fill(unseen, float("-inf")), size], 1)}


def _routed(result: tuple[Tensor, Tensor], a: dict[str, Any]) -> dict[str, Tensor]:
    weights, experts = result
    dense = weights.new_zeros(weights.shape[0], a["gate"].shape[0])
    return {"weight by expert": dense.scatter_add_(1, experts.clamp_min(0), weights)}


def _plan(plan: StepPlan, a: dict[str, Any]) -> dict[str, Tensor]:
    pages = torch.arange(plan.page_table.shape[1], device=plan.page_table.device)
    owned = pages * 256 < a["seq_lens"].unsqueeze(-1)
    found = {
        name: getattr(plan, name)
        for name in ("position", "request", "query", "window_write", "window")
    }
    found["page_table"] = plan.page_table.masked_fill(~owned, -1)
    for ratio, rows in plan.compression.items():
        real = rows.token >= 0
        for name in ("token", "position", "slots", "step_row", "ring_row"):
            found[f"ratio {ratio} {name}"] = getattr(rows, name)[real]
        found[f"ratio {ratio} ring_write_row"] = rows.ring_write_row
    return found


_VIEWS: dict[str, Callable[[Any, dict[str, Any]], dict[str, Tensor]]] = {
    "qk_norm_rope_store": _stored,
    "compress": _compressed,
    "rms_norm_quant": _quantised,
    "grouped_output": _grouped,
    "mhc_pre": _entered,
    "mhc_post_pre": _entered,
    "rope_hadamard_quant": _index_queries,
    "indexer_logits": _seen_logits,
    "route": _routed,
    "build_step_plan": _plan,
}
assert set(_VIEWS) | _DISCRETE | _FP8_INPUTS | _FP8_INPUTS_TWICE | _FP8_OUTPUTS <= set(OPERATORS)
