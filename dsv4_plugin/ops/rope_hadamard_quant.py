"""Indexer queries: RoPE, Hadamard rotation and quantisation (docs/model.md §3.4, §6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import hadamard, quantize_fp8, round_to_fp4
from .operator import Implementation, operator
from .rope import apply_rope


@operator
def rope_hadamard_quant(
    q: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, rounding: str
) -> tuple[Tensor, Tensor]:
    """Queries [T, n, 128] and head weights fp32 [T, n] as indexer_logits takes them.

    `q` [T, n, 128]; `weights` fp32 [T, n] as projected, which get the factor 128^-0.5 · n^-0.5;
    `cos`, `sin` [T, 32]. `rounding` is "none" or "fp4"
    (blocks of 32, as trained), which give fp32 queries, or "fp8" (one scale a head, as the packed
    index cache), which gives e4m3 queries; their scale, a positive power of two, then is in the
    weights: w · relu(s·q · k) = (w·s) · relu(q · k).
    """
    weights = weights * (q.shape[-1] ** -0.5 * q.shape[-2] ** -0.5)
    rotated = hadamard(apply_rope(q, cos, sin))
    if rounding == "fp8":
        values, scale = quantize_fp8(rotated, rotated.shape[-1])
        return values, weights * scale.squeeze(-1)
    return (round_to_fp4(rotated) if rounding == "fp4" else rotated), weights


def _needs_fp8_rounding(
    q: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, rounding: str
) -> str | None:
    if rounding != "fp8":
        return f"rounding is {rounding}, not fp8"
    return None if q.dtype == torch.bfloat16 else f"q is {q.dtype}, not bfloat16"


def _needs_a_power_of_two(
    q: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, rounding: str
) -> str | None:
    if reason := _needs_fp8_rounding(q, weights, cos, sin, rounding):
        return reason
    heads = q.shape[1]
    return f"{heads} heads are no power of two" if heads & (heads - 1) else None


rope_hadamard_quant.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.rope_hadamard_quant:rope_hadamard_quant",
        packages=("triton",),
        fp8=True,
        requires=_needs_fp8_rounding,
    )
)
rope_hadamard_quant.add(
    Implementation(
        "aiter",
        "dsv4_plugin.kernels.aiter.rope_hadamard_quant:rope_hadamard_quant",
        packages=("amd-aiter",),
        archs=("gfx950",),
        requires=_needs_a_power_of_two,
        measured=False,
    )
)
