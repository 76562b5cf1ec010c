"""Manifold-constrained hyper-connections: four residual streams mixed around every sub-layer
(docs/model.md §3.1, §3.6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import operator


def _mixes(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """fp32 [T, m]: projection of the flattened streams [T, n, d], scaled by their root mean
    square."""
    x = streams.flatten(1).float()
    return F.linear(x, fn) * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _collapse(pre: Tensor, streams: Tensor) -> Tensor:
    return torch.einsum("tn,tnd->td", pre, streams.float()).to(streams.dtype)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """fp32 [T, n, n] nearly doubly stochastic: softmax over the last dimension, then columns and
    rows in turn."""
    # tokens last: each sum adds whole vectors, 5 times faster on a CPU
    c = logits.permute(1, 2, 0).contiguous()
    c = c.softmax(1) + eps
    c = c / (c.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(1, keepdim=True) + eps)
        c = c / (c.sum(0, keepdim=True) + eps)
    return c.permute(2, 0, 1).contiguous()


@operator
def mhc_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a sub-layer reads and how its output returns: (input [T, d], post [T, n], comb [T, n,
    n]).

    `streams` [T, n, d]; `fn` fp32 [2n + n², n·d], `base` fp32 [2n + n²], `scale` fp32 [3]. The
    input has the dtype of the streams, `post` and `comb` are fp32; `comb` comes from Sinkhorn
    iterations.
    """
    n = streams.shape[1]
    m = _mixes(streams, fn, norm_eps)
    pre = torch.sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn(
        (m[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)), iterations, eps
    )
    return _collapse(pre, streams), post, comb


@operator
def mhc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Streams after a sub-layer: H'_k = post_k · y + sum_j comb_jk · H_j, in fp32, in the dtype of
    the streams.

    `y` [T, d]; `streams` [T, n, d] as before the sub-layer; `post` [T, n]; `comb` [T, n, n].
    """
    mixed = comb.transpose(1, 2) @ streams.float()
    return torch.addcmul(mixed, post.unsqueeze(-1), y.float().unsqueeze(1)).to(streams.dtype)


@operator
def mhc_head(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, norm_eps: float
) -> Tensor:
    """The streams [T, n, d] collapsed to [T, d] before the head; `fn` fp32 [n, n·d], `base` [n],
    `scale` [1]."""
    return _collapse(torch.sigmoid(_mixes(streams, fn, norm_eps) * scale + base) + eps, streams)
