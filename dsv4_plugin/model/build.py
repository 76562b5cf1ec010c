"""How the modules of one model are made: geometry, precision, share of this process, device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from .. import flags
from ..checkpoint.schema import expected_tensors
from ..config import Geometry, Precision
from ..ops import block_fp8_linear
from ..parallel import Parallel
from .linear import Linear, Norm, Rows

_SHARE = 16
"""Decoded matrices may take this part of a GPU's memory more than packed ones."""


def stays_packed(geometry: Geometry, parallel: Parallel, device: torch.device) -> bool:
    """DSV4_WEIGHTS, decided where it is auto: packed for a kernel that reads FP8 matrices; decoded
    on a CPU, and on a GPU whose products are the reference's, when its memory allows."""
    wanted = flags.read("DSV4_WEIGHTS")
    if wanted != "auto":
        return wanted == "packed"
    if device.type != "cuda":
        return device.type != "cpu"
    if block_fp8_linear.offers_kernel():
        return True
    room = torch.cuda.get_device_properties(device).total_memory / _SHARE
    return decoding_bytes(geometry, parallel) > room


def decoding_bytes(geometry: Geometry, parallel: Parallel) -> int:
    """Bytes that this process's FP8 matrices, experts aside, take more as bf16: one an element."""
    return sum(
        math.prod(spec.shape) // (getattr(parallel, spec.shard.group).size if spec.shard else 1)
        for spec in expected_tensors(geometry).values()
        if spec.dtype == "F8_E4M3" and spec.expert is None and not spec.name.startswith("mtp.")
    )


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
    def weight_dtype(self) -> torch.dtype:
        """Of what the file holds in bf16. On a CPU that decodes it is fp32, exactly: a small
        product there costs five times as much in bf16, and several are asked for in fp32 anyway.
        Kernels that are interpreted read what they read on a GPU, packed matrices and bf16."""
        on_cpu = self.device.type == "cpu" and not self.packed
        return torch.float32 if on_cpu else self.dtype

    @property
    def packed(self) -> bool:
        """Whether FP8 matrices stay as released, beside their scales, and meet FP8 activations."""
        return self.precision is Precision.SERVING and stays_packed(
            self.geometry, self.parallel, self.device
        )

    @property
    def dense(self) -> torch.dtype | None:
        """Of decoded FP8 matrices; None where they stay packed."""
        return None if self.packed else self.weight_dtype

    @property
    def dense_experts(self) -> torch.dtype | None:
        """Of decoded experts, which a GPU has no room for; None where they stay packed."""
        on_gpu = self.precision is Precision.SERVING and self.device.type != "cpu"
        return None if on_gpu else self.dense

    def fp8(self, out_features: int, in_features: int) -> Linear:
        return Linear(
            out_features, in_features, "fp8", self.dense, self.device, scale_dtype=self._scale_dtype
        )

    def bf16(self, out_features: int, in_features: int) -> Linear:
        return Linear(out_features, in_features, "bf16", self.weight_dtype, self.device)

    def experts(self, count: int, out_features: int, in_features: int) -> Linear:
        return Linear(
            out_features,
            in_features,
            self.geometry.expert_dtype,
            self.dense_experts,
            self.device,
            count,
            self._scale_dtype,
        )

    def norm(self, size: int) -> Norm:
        return Norm(size, self.weight_dtype, self.device)

    def rows(self, rows: int, size: int) -> Rows:
        return Rows(rows, size, self.weight_dtype, self.device)

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
