"""Manifold-constrained hyper-connections: four residual streams mixed around every sub-layer
(docs/model.md §3.1, §3.6)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import quantize_fp8
from .operator import Implementation, operator
from .rms_norm_quant import rms_norm


def _mixes(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """fp32 [T, m]: projection of the flattened fp32 streams [T, n, d], scaled by their root mean
    square."""
    x = streams.flatten(1)
    return F.linear(x, fn) * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _collapse(pre: Tensor, streams: Tensor) -> Tensor:
    """fp32 [T, d]: sum of the streams [T, n, d], each times its `pre` [T, n]."""
    return (pre.unsqueeze(1) @ streams).squeeze(1)


@functools.cache
@torch.inference_mode(False)  # kept, also for those who will take gradients
def _sums(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """0/1 matrices [n², n²] that replace each element of a flattened n×n matrix by the sum of its
    row, and of its column."""
    one, every = torch.eye(n, device=device), torch.ones(n, n, device=device)
    return torch.kron(one, every), torch.kron(every, one)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """fp32 [T, n, n] nearly doubly stochastic: softmax over the last dimension, then columns and
    rows in turn."""
    rows, columns = _sums(logits.shape[-1], logits.device)
    # tokens last: a sum is one small product for all of them
    c = (logits.softmax(-1) + eps).flatten(1).t().contiguous()
    least = torch.full_like(c, eps)
    c = c / torch.addmm(least, columns, c)
    for _ in range(iterations - 1):
        c = c / torch.addmm(least, rows, c)
        c = c / torch.addmm(least, columns, c)
    return c.t().contiguous().view_as(logits)


def _normed(
    u: Tensor, weight: Tensor, eps: float, quantize: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """RMSNorm of `u` [T, d], and with `quantize` its FP8 in blocks of 128."""
    x = rms_norm(u, weight, eps)
    return x, *(quantize_fp8(x, 128) if quantize else (None, None))


@operator
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
    """What a sub-layer reads and how its output returns: (input [T, d], its e4m3 codes [T, d],
    their fp32 scales [T, d/128], post [T, n], comb [T, n, n]).

    `streams` [T, n, d]; `fn` fp32 [2n + n², n·d], `base` fp32 [2n + n²], `scale` fp32 [3]. The
    collapsed streams, in their dtype, are normed with `norm_weight` [d]; codes and scales are None
    without `quantize`. `post` and `comb` are fp32; `comb` comes from Sinkhorn iterations.
    """
    n, x = streams.shape[1], streams.float()
    parts = [n, n, n * n]
    pre, post, comb = (
        torch.addcmul(offset, mix, factor)
        for mix, factor, offset in zip(
            _mixes(x, fn, norm_eps).split(parts, -1), scale.unbind(), base.split(parts)
        )
    )
    comb = sinkhorn(comb.unflatten(-1, (n, n)), iterations, eps)
    u = _collapse(pre.sigmoid() + eps, x).to(streams.dtype)
    return *_normed(u, norm_weight, norm_eps, quantize), 2 * post.sigmoid(), comb


@operator
def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Streams after a sub-layer: H'_k = post_k · y + sum_j comb_jk · H_j, in fp32, in the dtype of
    the streams.

    `y` [T, d]; `streams` [T, n, d] as before the sub-layer; `post` [T, n]; `comb` [T, n, n].
    """
    mixed = comb.transpose(1, 2) @ streams.float()
    return torch.addcmul(mixed, post.unsqueeze(-1), y.float().unsqueeze(1)).to(streams.dtype)


@operator
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
    """The boundary of two sub-layers: mhc_post of the one that gave `y`, then mhc_pre of the next.

    Returns the streams [T, n, d] between them and what mhc_pre returns.
    """
    streams = mhc_post.reference(y, streams, post, comb)
    return streams, *mhc_pre.reference(
        streams, fn, base, scale, norm_weight, iterations, eps, norm_eps, quantize
    )


@operator
def mhc_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """The streams [T, n, d] collapsed to [T, d] before the head, and normed where `norm_weight` [d]
    is given; `fn` fp32 [n, n·d], `base` [n], `scale` [1]."""
    x = streams.float()
    pre = torch.addcmul(base, _mixes(x, fn, norm_eps), scale).sigmoid() + eps
    u = _collapse(pre, x).to(streams.dtype)
    return u if norm_weight is None else rms_norm(u, norm_weight, norm_eps)


def _lacks(streams: Tensor) -> str | None:
    """Why kernels cannot take `streams`, or None."""
    if streams.dtype != torch.bfloat16:
        return f"the streams are {streams.dtype}, not bfloat16"
    _, n, dim = streams.shape
    if n != 4:
        return f"there are {n} streams, not 4"
    return f"{dim} channels are no multiple of 128" if dim % 128 else None


def _first_streams(streams: Tensor, *_: Any, **__: Any) -> str | None:
    return _lacks(streams)


def _second_streams(y: Tensor, streams: Tensor, *_: Any, **__: Any) -> str | None:
    return _lacks(streams)


_AITER_DIMS = (7168, 4096, 2560, 1280)
"""Channels that aiter's kernel of collapse and norm is compiled for."""


def _lacks_aiter(streams: Tensor, dims: tuple[int, ...]) -> str | None:
    """Why aiter's kernels cannot take `streams`, or None; without `dims` a multiple of 256 will
    do."""
    dim = streams.shape[-1]
    if reason := _lacks(streams):
        return reason
    if dims and dim not in dims:
        return f"{dim} channels are none of {', '.join(map(str, dims))}"
    return f"{dim} channels are no multiple of 256" if dim % 256 else None


def _aiter_pre(streams: Tensor, *_: Any, **__: Any) -> str | None:
    return _lacks_aiter(streams, _AITER_DIMS)


def _aiter_post_pre(y: Tensor, streams: Tensor, *_: Any, **__: Any) -> str | None:
    return _lacks_aiter(streams, _AITER_DIMS)


def _aiter_post(y: Tensor, streams: Tensor, *_: Any, **__: Any) -> str | None:
    return _lacks_aiter(streams, ())


for _operator, _requires in (
    (mhc_pre, _first_streams),
    (mhc_post, _second_streams),
    (mhc_post_pre, _second_streams),
    (mhc_head, _first_streams),
):
    _operator.add(
        Implementation(
            "triton",
            f"dsv4_plugin.kernels.triton.mhc:{_operator.name}",
            packages=("triton",),
            fp8=_operator in (mhc_pre, mhc_post_pre),
            requires=_requires,
        )
    )
for _operator, _requires, _archs in (
    (mhc_pre, _aiter_pre, ("gfx950",)),
    (mhc_post, _aiter_post, ("gfx942", "gfx950")),
    (mhc_post_pre, _aiter_post_pre, ("gfx950",)),
):
    _operator.add(
        Implementation(
            "aiter",
            f"dsv4_plugin.kernels.aiter.mhc:{_operator.name}",
            packages=("amd-aiter",),
            archs=_archs,
            requires=_requires,
            measured=False,
        )
    )
for _operator, _requires in (
    (mhc_pre, _first_streams),
    (mhc_post, _second_streams),
    (mhc_post_pre, _second_streams),
):
    _operator.add(
        Implementation(
            "tilelang",
            f"dsv4_plugin.kernels.tilelang.mhc:{_operator.name}",
            packages=("tilelang==0.1.12",),
            archs=("gfx950", "sm_90"),  # gfx942 has other FP8 codes, and nothing of it was executed
            requires=_requires,
            measured=False,
        )
    )
