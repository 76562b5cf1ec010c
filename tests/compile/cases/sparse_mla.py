"""sparse_mla: decode and prefill of Pro on 8-way tensor parallelism (16 heads), on data parallelism
(128), and of Flash."""

from __future__ import annotations

import torch
from registry import Case, Units

from dsv4_plugin.cache.layout import entries_per_page, latent_page_bytes
from dsv4_plugin.cache.stores import PackedLatentCache
from dsv4_plugin.kernels.gluon import sparse_mla as gluon
from dsv4_plugin.kernels.triton import sparse_mla as triton

_POOL_BYTES = 3 << 30  # over 2 GiB, as in production: 64-bit addresses


def _cache(ratio: int) -> PackedLatentCache:
    slots = entries_per_page(ratio)
    page = latent_page_bytes(slots)
    return PackedLatentCache(
        torch.empty(_POOL_BYTES // page, page, dtype=torch.uint8, device="meta"), slots
    )


def _call(kernel, tokens: int, heads: int, entries: int, ratio: int) -> torch.Tensor:
    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    compressed = (
        (_cache(ratio), meta(tokens, entries, dtype=torch.int64)) if ratio else (None, None)
    )
    rotation = [meta(tokens, 32, dtype=torch.float32)] * 2
    return kernel.sparse_mla(
        meta(tokens, heads, 512, dtype=torch.bfloat16),
        _cache(0),
        meta(tokens, 128, dtype=torch.int64),
        *compressed,
        meta(heads, dtype=torch.float32),
        512**-0.5,
        *rotation,
    )


def _units(constants) -> Units:
    """A pass works off BLOCK_K slots for BLOCK_H heads, two products of 512 multiply-adds each."""
    return Units("slot*head", constants["BLOCK_K"] * constants["BLOCK_H"], 2 * 512)


# (name, tokens, heads, compressed entries, ratio, most issue cycles a slot and head on gfx950)
SHAPES = [
    ("decode/16-heads/4-tokens", 4, 16, 1024, 4, 1.5),
    ("decode/16-heads/512-tokens", 512, 16, 1024, 4, 1.5),
    ("decode/16-heads/64-tokens/c128", 64, 16, 8192, 128, 1.5),
    ("decode/16-heads/64-tokens/window", 64, 16, 0, 0, 1.5),
    ("decode/32-heads/64-tokens", 64, 32, 512, 4, 1.5),
    ("decode/128-heads/4-tokens", 4, 128, 1024, 4, 1.01),
    ("decode/128-heads/256-tokens", 256, 128, 1024, 4, 1.01),
    ("prefill/16-heads/4096-tokens", 4096, 16, 1024, 4, 1.5),
    ("prefill/128-heads/4096-tokens", 4096, 128, 1024, 4, 1.01),
]
CASES = [
    Case(
        f"gluon/{name}",
        lambda shape=shape: _call(gluon, *shape),
        matrix={"_attend": "16-bit"},
        units={"_attend": _units},
        workgroups={"_attend": 2},
        issue={"_attend": most},
        archs=("gfx950",),
    )
    for name, *shape, most in SHAPES
]
CASES += [
    Case(
        f"triton/{name}",
        lambda shape=shape: _call(triton, *shape),
        matrix={"_attend": "16-bit"},
        units={"_attend": _units},
    )
    for name, *shape, _ in (SHAPES[1], SHAPES[2], SHAPES[5], SHAPES[6])
]
