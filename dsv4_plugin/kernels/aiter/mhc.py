"""Hyper-connections in aiter's HIP kernels, norm included; the FP8 of what comes out is a launch of
its own."""

from __future__ import annotations

import torch
from aiter.ops.mhc import mhc_fused_post_pre
from aiter.ops.mhc import mhc_post as mix
from aiter.ops.mhc import mhc_pre as enter
from aiter.ops.quant import per_group_quant_hip
from torch import Tensor

from ..strides import require_contiguous
from . import require_arguments

require_arguments(enter, "norm_weight", "norm_eps")
require_arguments(mhc_fused_post_pre, "norm_weight", "norm_eps")

_POST = 2.0
"""Factor of the sigmoid that gives `post`."""


def mhc_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    quantize: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The operator of the same name for four bf16 streams."""
    if not streams.shape[0]:
        return _nothing(streams, quantize)
    require_contiguous("mhc_pre", streams=streams, fn=fn, norm_weight=norm_weight)
    post, comb, x = enter(
        streams,
        fn,
        hc_scale=scale,
        hc_base=base,
        rms_eps=norm_eps,
        hc_pre_eps=eps,
        hc_sinkhorn_eps=eps,
        hc_post_mult_value=_POST,
        sinkhorn_repeat=iterations,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
    )
    return x, *_fp8(x, quantize), post.squeeze(-1), comb


def mhc_post_pre(
    y: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    quantize: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The operator of the same name for four bf16 streams; aiter fuses it up to 1,024 rows."""
    if not streams.shape[0]:
        return streams, *_nothing(streams, quantize)
    require_contiguous(
        "mhc_post_pre", y=y, streams=streams, post=post, comb=comb, fn=fn, norm_weight=norm_weight
    )
    post, comb, x, streams = mhc_fused_post_pre(
        layer_input=y,
        residual_in=streams,
        post_layer_mix=post,
        comb_res_mix=comb,
        fn=fn,
        hc_scale=scale,
        hc_base=base,
        rms_eps=norm_eps,
        hc_pre_eps=eps,
        hc_sinkhorn_eps=eps,
        hc_post_mult_value=_POST,
        sinkhorn_repeat=iterations,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
    )
    return streams, x, *_fp8(x, quantize), post.squeeze(-1), comb


def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The operator of the same name for four bf16 streams."""
    require_contiguous("mhc_post", y=y, streams=streams, post=post, comb=comb)
    out = torch.empty_like(streams)
    if streams.shape[0]:
        mix(out, y, streams, post.unsqueeze(-1), comb)
    return out


def _fp8(x: Tensor, quantize: bool) -> tuple[Tensor | None, Tensor | None]:
    """Codes and fp32 scales amax / 448 of blocks of 128; aiter does not round them up to powers of
    two."""
    if not quantize:
        return None, None
    return per_group_quant_hip(x, quant_dtype=torch.float8_e4m3fn, group_size=128)


def _nothing(streams: Tensor, quantize: bool) -> tuple:
    """What a sub-layer reads of no rows."""
    _, n, dim = streams.shape
    fp32 = {"dtype": torch.float32, "device": streams.device}
    codes = torch.empty(0, dim, dtype=torch.float8_e4m3fn, device=streams.device)
    return (
        streams.new_empty(0, dim),
        *((codes, torch.empty(0, dim // 128, **fp32)) if quantize else (None, None)),
        torch.empty(0, n, **fp32),
        torch.empty(0, n, n, **fp32),
    )
