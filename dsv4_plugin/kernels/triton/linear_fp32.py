"""Products of bf16 with an fp32 result (product.py)."""

from __future__ import annotations

from torch import Tensor

from .product import multiply


def linear_fp32(
    x: Tensor, weight: Tensor, parts: tuple[int, ...] = ()
) -> Tensor | tuple[Tensor, ...]:
    """The operator of the same name for bf16 `x` and `weight`."""
    _, _, results = multiply(x, None, weight, None, "fp32", parts=parts)
    return tuple(results) if parts else results[0]
