"""Launches of qk_norm_rope_store."""

import torch
from registry import Case

from dsv4_plugin.cache import PackedLatentCache, latent_page_bytes
from dsv4_plugin.kernels.triton.qk_norm_rope_store import qk_norm_rope_store


def _launch(tokens: int, heads: int):
    bf16, fp32 = ({"dtype": dtype, "device": "meta"} for dtype in (torch.bfloat16, torch.float32))
    cache = PackedLatentCache(
        torch.empty(20000, latent_page_bytes(256), dtype=torch.uint8, device="meta"), 256
    )
    qk_norm_rope_store(
        torch.empty(tokens, heads, 512, **bf16),
        torch.empty(tokens, 512, **bf16),
        torch.empty(512, **bf16),
        1e-6,
        torch.empty(tokens, 32, **fp32),
        torch.empty(tokens, 32, **fp32),
        torch.empty(tokens, dtype=torch.int64, device="meta"),
        cache,
    )


CASES = [
    Case("pro-tp8/64-tokens", lambda: _launch(64, 16), workgroups={"qk_norm_rope_store_kernel": 4}),
    Case(
        "pro-dp8/64-tokens", lambda: _launch(64, 128), workgroups={"qk_norm_rope_store_kernel": 4}
    ),
]
