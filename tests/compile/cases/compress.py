"""Launches of compress."""

import torch
from registry import Case

from dsv4_plugin.cache import (
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from dsv4_plugin.cache.step_plan import Compression, static_windows
from dsv4_plugin.kernels.triton.compress import compress

FLOATS = {"dtype": torch.float32, "device": "meta"}
NUMBERS = {"dtype": torch.int64, "device": "meta"}


def _launch(ratio: int, dim: int, tokens: int, requests: int):
    halves, windows = (2 if ratio == 4 else 1), static_windows(tokens, requests, ratio)
    numbers = [torch.empty(windows, **NUMBERS) for _ in range(3)]
    items = [torch.empty(windows, ratio * halves, **NUMBERS) for _ in range(2)]
    rows = Compression(ratio, halves, *numbers, *items, torch.empty(tokens, **NUMBERS))
    if dim == 128:
        cache = PackedIndexCache(
            torch.empty(60000, index_page_bytes(), dtype=torch.uint8, device="meta")
        )
    else:
        slots = entries_per_page(ratio)
        cache = PackedLatentCache(
            torch.empty(60000, latent_page_bytes(slots), dtype=torch.uint8, device="meta"), slots
        )
    turn = torch.empty(windows, 32, **FLOATS)
    compress(
        torch.empty(tokens, 2 * halves * dim, **FLOATS),
        torch.empty(40000, 2 * halves * dim, **FLOATS),
        rows,
        torch.empty(ratio, halves * dim, **FLOATS),
        torch.empty(dim, dtype=torch.bfloat16, device="meta"),
        1e-6,
        turn,
        turn,
        cache,
        torch.bfloat16,
        dim == 128,
    )


CASES = [
    Case(
        f"{name}/{phase}",
        lambda a=(ratio, dim, *size): _launch(*a),
        workgroups={"pool_kernel": 3, "keep_kernel": 4},
    )
    for name, ratio, dim in (("c4", 4, 512), ("c4-index", 4, 128), ("c128", 128, 512))
    for phase, size in (("decode-64", (64, 64)), ("prefill-8192", (8192, 4)))
]
