"""Query and latent before attention, one head and one token at a time in float64 (docs/model.md
§3.2)."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch

from dsv4_plugin.cache import DenseLatentCache, PackedLatentCache, latent_page_bytes
from dsv4_plugin.ops import qk_norm_rope_store

EPS = 1e-6


def normed_and_turned(x: np.ndarray, weight: np.ndarray, angles: np.ndarray) -> np.ndarray:
    y = x * weight / math.sqrt((x * x).mean() + EPS)
    for i, angle in enumerate(angles):
        z = complex(y[448 + 2 * i], y[449 + 2 * i]) * cmath.exp(1j * angle)
        y[448 + 2 * i], y[449 + 2 * i] = z.real, z.imag
    return y


def run(tokens: int, cache, dtype=torch.float32):
    q, kv, weight = (
        torch.randn(tokens, 3, 512).to(dtype),
        torch.randn(tokens, 512).to(dtype),
        torch.randn(512).to(dtype),
    )
    angle = torch.rand(tokens, 32) * 7
    slots = torch.randperm(300)[:tokens]
    out = qk_norm_rope_store.reference(q, kv, weight, EPS, angle.cos(), angle.sin(), slots, cache)
    q, kv, weight, angle = (x.double().numpy() for x in (q, kv, weight, angle))
    queries = np.array(
        [[normed_and_turned(head, np.ones(512), a) for head in heads] for heads, a in zip(q, angle)]
    )
    latents = np.array([normed_and_turned(row, weight, a) for row, a in zip(kv, angle)])
    return out, slots, queries, latents


def test_queries_and_latents():
    cache = DenseLatentCache(300, rounded=False)
    cache.values.fill_(7.0)
    out, slots, queries, latents = run(6, cache)
    # A mean over 512, a root and a rotation in fp32, of values up to 5.
    np.testing.assert_allclose(out.double().numpy(), queries, rtol=0, atol=5e-6)
    np.testing.assert_allclose(cache.load(slots).double().numpy(), latents, rtol=0, atol=2e-5)
    others = torch.ones(300, dtype=torch.bool)
    others[slots] = False
    assert (cache.values[others] == 7.0).all()


def test_packed_cache_rounds_the_latent_only():
    cache = PackedLatentCache(torch.full((2, latent_page_bytes(256)), 0xA5, dtype=torch.uint8), 256)
    out, slots, queries, latents = run(6, cache, torch.bfloat16)
    got = cache.load(slots).double().numpy()
    # bf16 input is normed to bf16 and rotated to bf16: two roundings, the second of a sum of two
    # such values.
    np.testing.assert_allclose(out.double().numpy(), queries, rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(got[:, 448:], latents[:, 448:], rtol=2**-7, atol=2**-6)
    # e4m3 keeps 3 bits, half a unit is 2^-4; its subnormal step is 2^-9 of a scale that is at most
    # amax/224.
    amax = np.abs(latents[:, :448].reshape(-1, 7, 64)).max(-1).repeat(64, -1)
    assert (
        np.abs(got[:, :448] - latents[:, :448])
        <= 2**-4 * 1.05 * np.abs(latents[:, :448]) + amax * 2**-16
    ).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(dtype):
    cache = DenseLatentCache(300, rounded=False)
    empty = torch.empty(0, 32)
    out = qk_norm_rope_store.reference(
        torch.empty(0, 3, 512, dtype=dtype),
        torch.empty(0, 512, dtype=dtype),
        torch.ones(512, dtype=dtype),
        EPS,
        empty,
        empty,
        torch.empty(0, dtype=torch.int64),
        cache,
    )
    assert out.shape == (0, 3, 512) and not cache.values.any()
