"""Query and latent just before attention: norm, RoPE, and the latent's store into the window cache
(docs/model.md §3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.stores import PackedLatentCache, SlotStore
from .operator import Implementation, operator
from .rms_norm_quant import rms_norm
from .rope import apply_rope


@operator
def qk_norm_rope_store(
    q: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: SlotStore,
) -> Tensor:
    """Normed and rotated queries [T, h, 512]; the latents are normed, rotated and stored.

    `q` [T, h, 512] is normed per head without a weight, `kv` [T, 512] with `kv_weight` [512];
    `cos`, `sin` [T, 32]; `slots` int64 [T] are window slots of `cache`, which quantises as its
    format says.
    """
    store_latents(kv, kv_weight, eps, cos, sin, slots, cache)
    return apply_rope(rms_norm(q, None, eps), cos, sin)


def store_latents(
    kv: Tensor,
    kv_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: SlotStore,
) -> None:
    """The half of it that keeps latents: of tokens whose queries nobody needs."""
    cache.store(slots, apply_rope(rms_norm(kv, kv_weight, eps), cos, sin))


def _needs_packed_bf16(
    q: Tensor,
    kv: Tensor,
    kv_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: SlotStore,
) -> str | None:
    if not isinstance(cache, PackedLatentCache):
        return f"the window cache is a {type(cache).__name__}, not packed"
    return (
        None
        if q.dtype == kv.dtype == torch.bfloat16
        else f"q is {q.dtype} and kv {kv.dtype}, not bfloat16"
    )


qk_norm_rope_store.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.qk_norm_rope_store:qk_norm_rope_store",
        packages=("triton",),
        fp8=True,
        requires=_needs_packed_bf16,
    )
)
