"""Indexer queries: RoPE, Hadamard rotation and quantisation (docs/model.md §3.4, §6)."""

from __future__ import annotations

from torch import Tensor

from ..formats import dequantize_fp8, hadamard, quantize_fp8, round_to_fp4
from .operator import operator
from .rope import apply_rope


@operator
def rope_hadamard_quant(q: Tensor, cos: Tensor, sin: Tensor, rounding: str) -> Tensor:
    """Queries [T, n, 128] as the index scores see them, in fp32.

    `q` [T, n, 128]; `cos`, `sin` [T, 32]; `rounding` is "none", "fp4" (blocks of 32, as trained) or "fp8" (one scale
    a head, as the packed index cache).
    """
    rotated = hadamard(apply_rope(q, cos, sin))
    if rounding == "fp4":
        return round_to_fp4(rotated)
    if rounding == "fp8":
        return dequantize_fp8(*quantize_fp8(rotated, rotated.shape[-1]))
    return rotated
