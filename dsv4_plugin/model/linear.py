"""Matrices of the model, in the form they stay in memory: dense, or packed as released."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..formats import dense_weight
from ..ops import block_fp8_linear, linear_fp32


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class Activation(NamedTuple):
    """What matrices read: rows [T, n], and where matrices are packed their FP8 in blocks of 128.

    `values` is None where all readers take FP8."""

    values: Tensor | None
    codes: Tensor | None = None
    scale: Tensor | None = None


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

    def forward(self, x: Tensor | Activation) -> Tensor:
        """x Wᵀ in the dtype of `x`."""
        return block_fp8_linear(*_operands(x, self.weight, self.scale))


def _operands(x: Tensor | Activation, weight: Tensor, scale: Tensor | None) -> tuple:
    """Arguments of block_fp8_linear for an input in any form."""
    if not isinstance(x, Activation):
        return x, weight, scale
    if scale is None or x.codes is None:
        return x.values, weight, scale
    return x.codes, weight, scale, x.scale


class Joint:
    """Matrices of one input that lie one after the other in memory: one product gives all results.

    The matrices keep their parameters, which become views of the joint memory. `parts` are the rows
    of each result, by default those of each matrix.
    """

    def __init__(self, *linears: Linear, parts: tuple[int, ...] = ()):
        rows = tuple(linear.weight.shape[0] for linear in linears)
        self.parts = parts or rows
        if linears[0].scale is not None and any(count % 128 for count in rows[:-1]):
            raise ValueError(
                f"FP8 matrices of {rows} rows cannot be one: a block of 128 rows has one scale;"
                " DSV4_WEIGHTS=dense decodes them"
            )
        self.weight = _beside([linear.weight for linear in linears])
        self.scale = None
        for linear, part in zip(linears, self.weight.split(rows)):
            linear.weight = nn.Parameter(part, requires_grad=False)
        if linears[0].scale is not None:
            blocks = [linear.scale.shape[0] for linear in linears]
            self.scale = _beside([linear.scale for linear in linears])
            for linear, part in zip(linears, self.scale.split(blocks)):
                linear.scale = nn.Parameter(part, requires_grad=False)

    def __call__(self, x: Tensor | Activation) -> tuple[Tensor, ...]:
        """The results [T, n] of `x`, one for each part."""
        operands = _operands(x, self.weight, self.scale)
        return block_fp8_linear(*operands, *[None] * (4 - len(operands)), self.parts)

    def fp32(self, x: Tensor) -> tuple[Tensor, ...]:
        """The results fp32 [T, n] of `x`, one for each part."""
        return linear_fp32(x, self.weight, self.parts)


def _beside(parts: list[Tensor]) -> Tensor:
    rows = sum(part.shape[0] for part in parts)
    return torch.empty(rows, parts[0].shape[1], dtype=parts[0].dtype, device=parts[0].device)


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
