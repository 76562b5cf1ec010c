"""RMSNorm, optionally followed by FP8 quantisation for the next matrix product (docs/model.md §3,
§6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import quantize_fp8
from .operator import Implementation, operator


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x²) + eps) * weight over the last dimension, in fp32, in the dtype of `x`."""
    y = x.float()
    return torch.rms_norm(y, y.shape[-1:], None if weight is None else weight.float(), eps).to(
        x.dtype
    )


@operator
def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, keep: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """RMSNorm of `x` [T, n] and its per-token FP8 in blocks of 128: (normed [T, n], e4m3 [T, n],
    fp32 scale [T, n/128]).

    `keep` says what its readers want: "normed", "fp8" or "both"; what is not kept is None.
    """
    y = rms_norm(x, weight, eps)
    return y if keep != "fp8" else None, *(
        quantize_fp8(y, 128) if keep != "normed" else (None, None)
    )


def _needs_bf16(x: Tensor, weight: Tensor, eps: float, keep: str) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, not bfloat16"
    if x.stride(-1) != 1:
        return "the channels of x do not lie side by side"
    return f"{x.shape[1]} channels are no multiple of 128" if x.shape[1] % 128 else None


def _needs_few_channels(x: Tensor, weight: Tensor, eps: float, keep: str) -> str | None:
    if reason := _needs_bf16(x, weight, eps, keep):
        return reason
    if weight.dtype != torch.bfloat16:
        return f"the weight is {weight.dtype}, not bfloat16"
    return f"{x.shape[1]} channels are more than 8,192" if x.shape[1] > 8192 else None


rms_norm_quant.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.rms_norm_quant:rms_norm_quant",
        packages=("triton",),
        fp8=True,
        requires=_needs_bf16,
    )
)
rms_norm_quant.add(
    Implementation(
        "aiter",
        "dsv4_plugin.kernels.aiter.rms_norm_quant:rms_norm_quant",
        packages=("amd-aiter",),
        archs=("gfx950",),
        requires=_needs_few_channels,
        measured=False,
    )
)
