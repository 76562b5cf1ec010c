"""Matrix products of the projections: released FP8 weights, and bf16 weights with an fp32 result
(docs/model.md §2, §6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import dense_weight, dequantize_fp8
from .operator import Implementation, operator


def _cut(y: Tensor, parts: tuple[int, ...]) -> Tensor | tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in y.split(parts, -1)) if parts else y


@operator
def block_fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    parts: tuple[int, ...] = (),
) -> Tensor | tuple[Tensor, ...]:
    """x Wᵀ [T, out] in the dtype of `x` [T, in]; with `parts`, which sum to out, as one
    contiguous tensor for each.

    `weight` is dense [out, in], in the dtype of `x` or in fp32, when `scale` is None, else
    float8_e4m3fn with 128×128 block scales. With `x_scale` fp32 [T, in/128] `x` is e4m3 and the
    result bf16. Without it an implementation may also quantise `x` to FP8 per token in blocks of
    128, as the released recipe does.
    """
    if x_scale is not None:
        full = dequantize_fp8(x, x_scale)
        return _cut(F.linear(full, dense_weight(weight, scale, full.dtype)).bfloat16(), parts)
    return _cut(linear(x, dense_weight(weight, scale, x.dtype)), parts)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in the dtype of `x`, for a dense `weight` in that dtype or a wider one."""
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


@operator
def linear_fp32(
    x: Tensor, weight: Tensor, parts: tuple[int, ...] = ()
) -> Tensor | tuple[Tensor, ...]:
    """x Wᵀ [T, out] with fp32 accumulation and an fp32 result, for projections that docs/model.md
    §6 keeps in fp32; with `parts`, which sum to out, as one contiguous tensor for
    each."""
    return _cut(F.linear(x.float(), weight.float()), parts)


def _needs_packed_weight(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    parts: tuple[int, ...] = (),
) -> str | None:
    if scale is None:
        return "the weight is dense"
    if x_scale is None and x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, not bfloat16"
    return f"{x.shape[1]} channels are no multiple of 128" if x.shape[1] % 128 else None


def _needs_bf16(x: Tensor, weight: Tensor, parts: tuple[int, ...] = ()) -> str | None:
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"x is {x.dtype} and the weight {weight.dtype}, not bfloat16"
    return f"{x.shape[1]} channels are no multiple of 64" if x.shape[1] % 64 else None


for _operator, _requires in ((block_fp8_linear, _needs_packed_weight), (linear_fp32, _needs_bf16)):
    _operator.add(
        Implementation(
            "triton",
            f"dsv4_plugin.kernels.triton.{_operator.name}:{_operator.name}",
            packages=("triton",),
            fp8=_operator is block_fp8_linear,
            requires=_requires,
        )
    )
block_fp8_linear.add(
    Implementation(
        "aiter",
        "dsv4_plugin.kernels.aiter.block_fp8_linear:block_fp8_linear",
        packages=("amd-aiter",),
        archs=("gfx950",),
        requires=_needs_packed_weight,
        measured=False,
    )
)
