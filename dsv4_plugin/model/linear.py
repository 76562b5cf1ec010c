"""Matrices of the model, in the form they stay in memory: dense, or packed as released."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats import dense_weight
from ..ops import block_fp8_linear


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """A weight [out, in] of the checkpoint, or `experts` of them stacked.

    `stored` is "fp8", "fp4" or "bf16" as in the file. With a `dense` dtype the weight is decoded
    once at loading; with None an FP8 or FP4 weight stays packed beside its `scale`.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        stored: str,
        dense: torch.dtype | None,
        device: torch.device,
        experts: int | None = None,
        scale_dtype: torch.dtype = torch.float8_e8m0fnu,
    ):
        super().__init__()
        stack = () if experts is None else (experts,)
        self.scale: nn.Parameter | None = None
        if dense is not None or stored == "bf16":
            self.weight = _parameter(
                *stack, out_features, in_features, dtype=dense or torch.bfloat16, device=device
            )
        elif stored == "fp8":
            self.weight = _parameter(
                *stack, out_features, in_features, dtype=torch.float8_e4m3fn, device=device
            )
            self.scale = _parameter(
                *stack,
                -(-out_features // 128),
                -(-in_features // 128),
                dtype=scale_dtype,
                device=device,
            )
        else:
            self.weight = _parameter(
                *stack, out_features, in_features // 2, dtype=torch.int8, device=device
            )
            self.scale = _parameter(
                *stack, out_features, in_features // 32, dtype=scale_dtype, device=device
            )

    def load(self, weight: Tensor, scale: Tensor | None, expert: int | None = None) -> None:
        """Takes a released tensor, already cut to this rank, with its scale if it has one; `expert`
        is the row of a stack."""
        here = slice(None) if expert is None else expert
        if self.scale is not None:
            self.weight.data[here].copy_(weight)
            self.scale.data[here].copy_(scale)
        else:
            self.weight.data[here].copy_(dense_weight(weight, scale, self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ in the dtype of `x`."""
        return block_fp8_linear(x, self.weight, self.scale)


class Norm(nn.Module):
    """Weight of an RMSNorm, fp32 or bf16."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = _parameter(size, dtype=dtype, device=device)


class Rows(nn.Module):
    """A plain matrix kept row by row: embedding, head, router gate."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = _parameter(rows, size, dtype=dtype, device=device)
