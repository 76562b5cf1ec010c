"""Rotary position embedding: interleaved pairs of the last 64 dimensions, fp32 (docs/model.md §1
YaRN, §3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import Geometry


def inverse_frequencies(geometry: Geometry, ratio: int) -> Tensor:
    """fp32 [32] angular frequencies of a layer with compress ratio `ratio`: plain for 0, YaRN
    otherwise."""
    dim = geometry.qk_rope_head_dim
    theta = geometry.compress_rope_theta if ratio else geometry.rope_theta
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if not ratio:
        return frequency
    yarn = geometry.yarn

    def pair_of_rotations(rotations: float) -> float:
        return (
            dim
            * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low = max(math.floor(pair_of_rotations(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of_rotations(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - ramp) + frequency / yarn.factor * ramp


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) fp32 [n, 32] at `positions` int64 [n]."""
    angle = positions.float().unsqueeze(-1) * frequencies
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """`x` [n, ..., d] with its last 64 dimensions rotated by the (cos, sin) [n, 32] of each row, in
    the dtype of `x`.

    Pair (2i, 2i+1) is one complex number multiplied by e^{±i·angle}.
    """
    rope_dim = 2 * cos.shape[-1]
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[-1],)
    cos, sin = cos.view(shape), sin.view(shape)
    if inverse:
        sin = -sin
    nope, pairs = x[..., :-rope_dim], x[..., -rope_dim:].float().unflatten(-1, (-1, 2))
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = (
        torch.addcmul(real * cos, imaginary, sin, value=-1),
        torch.addcmul(real * sin, imaginary, cos),
    )
    return torch.cat((nope, torch.stack(turned, -1).flatten(-2).to(x.dtype)), -1)
