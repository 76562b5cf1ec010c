"""Indexer queries in aiter's kernel of the same three steps."""

from __future__ import annotations

import torch
from aiter.ops.quant import rope_rotate_activation
from torch import Tensor

from ..strides import require_dense_rows


def rope_hadamard_quant(
    q: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, rounding: str
) -> tuple[Tensor, Tensor]:
    """The operator of the same name for bf16 queries of 2^k heads and `rounding` "fp8"; aiter takes
    cos and sin in bf16, and its scales, amax / 448, are no powers of two."""
    require_dense_rows("rope_hadamard_quant", q=q, cos=cos, sin=sin)
    rows, heads, dim = q.shape
    codes = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    scale = torch.empty(rows, heads, 1, dtype=torch.float32, device=q.device)
    if rows:
        rope_rotate_activation(
            codes,
            q,
            cos.to(q.dtype),
            sin.to(q.dtype),
            torch.arange(rows, device=q.device),
            2 * cos.shape[-1],
            out_scale=scale,
            group_size=dim,
        )
    return codes, weights * (dim**-0.5 * heads**-0.5) * scale.squeeze(-1)
