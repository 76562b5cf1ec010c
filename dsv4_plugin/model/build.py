"""How the modules of one model are made: geometry, precision, share of this process, device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..config import Geometry, Precision
from ..parallel import Parallel
from .linear import Linear, Norm, Rows


@dataclass(frozen=True)
class Build:
    """Makes parameters with the dtypes that a precision asks for."""

    geometry: Geometry
    precision: Precision
    parallel: Parallel
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return torch.bfloat16 if self.precision is Precision.SERVING else torch.float32

    @property
    def dense(self) -> torch.dtype | None:
        """Of decoded matrices; None keeps them packed, which only kernels on a GPU profit from."""
        packed = self.precision is Precision.SERVING and self.device.type != "cpu"
        return None if packed else self.dtype

    def fp8(self, out_features: int, in_features: int) -> Linear:
        return Linear(
            out_features, in_features, "fp8", self.dense, self.device, scale_dtype=self._scale_dtype
        )

    def bf16(self, out_features: int, in_features: int) -> Linear:
        return Linear(out_features, in_features, "bf16", self.dtype, self.device)

    def experts(self, count: int, out_features: int, in_features: int) -> Linear:
        return Linear(
            out_features,
            in_features,
            self.geometry.expert_dtype,
            self.dense,
            self.device,
            count,
            self._scale_dtype,
        )

    def norm(self, size: int) -> Norm:
        return Norm(size, self.dtype, self.device)

    def rows(self, rows: int, size: int) -> Rows:
        return Rows(rows, size, self.dtype, self.device)

    def fp32(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(
            torch.empty(shape, dtype=torch.float32, device=self.device), requires_grad=False
        )

    def int64(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(
            torch.zeros(shape, dtype=torch.int64, device=self.device), requires_grad=False
        )

    @property
    def _scale_dtype(self) -> torch.dtype:
        """Base checkpoints, which store FP8 experts, scale with fp32 (docs/model.md §1)."""
        return torch.float32 if self.geometry.expert_dtype == "fp8" else torch.float8_e8m0fnu
