"""Products with 128x128-scaled FP8 weights, FP8 activations included (product.py)."""

from __future__ import annotations

from torch import Tensor

from .product import multiply


def block_fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    x_scale: Tensor | None = None,
    parts: tuple[int, ...] = (),
) -> Tensor | tuple[Tensor, ...]:
    """The operator of the same name for a packed weight; bf16 `x` is rounded to FP8 as the release
    does."""
    _, _, results = multiply(x, x_scale, weight, scale, "bf16", parts=parts)
    return tuple(results) if parts else results[0]
