"""Query and latent just before attention: norm, RoPE, and the latent's store into the window cache (docs/model.md §3.2)."""

from __future__ import annotations

from torch import Tensor

from ..cache.stores import SlotStore
from .operator import operator
from .rms_norm_quant import rms_norm
from .rope import apply_rope


@operator
def qk_norm_rope_store(q: Tensor, kv: Tensor, kv_weight: Tensor, eps: float, cos: Tensor, sin: Tensor,
                       slots: Tensor, cache: SlotStore) -> Tensor:
    """Normed and rotated queries [T, h, 512]; the latents are normed, rotated and stored.

    `q` [T, h, 512] is normed per head without a weight, `kv` [T, 512] with `kv_weight` [512]; `cos`, `sin` [T, 32];
    `slots` int64 [T] are window slots of `cache`, which quantises as its format says.
    """
    latent = apply_rope(rms_norm(kv, kv_weight, eps), cos, sin)
    cache.store(slots, latent)
    return apply_rope(rms_norm(q, None, eps), cos, sin)
