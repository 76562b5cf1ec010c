"""The grouped output projection: product.py with a group of input channels for each group of rows,
FP8 or bf16, and the FP8 that the next product reads."""

from __future__ import annotations

from torch import Tensor

from .product import multiply


def grouped_output(
    o: Tensor, weight: Tensor, scale: Tensor | None, groups: int, quantize: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The operator of the same name for bf16 `o`."""
    out = "fp8" if quantize else "bf16"
    flat, out_scale, _ = multiply(o.flatten(1), None, weight, scale, out, groups)
    z = flat.view(o.shape[0], weight.shape[0])
    return (z, out_scale) if quantize else z
