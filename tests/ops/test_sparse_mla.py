"""Attention with a sink over gathered latents, one query and head at a time in float64, and complex
numbers turned back (docs/model.md §3.2)."""

from __future__ import annotations

import math
from importlib import import_module

import numpy as np
import pytest
import torch

from dsv4_plugin.cache import (
    DenseLatentCache,
    PackedLatentCache,
    entries_per_page,
    latent_page_bytes,
)
from dsv4_plugin.ops import sparse_mla

pytestmark = pytest.mark.usefixtures("each_form")
# `ops.sparse_mla` is the operator, which hides the module of the same name.
MODULE = import_module("dsv4_plugin.ops.sparse_mla")
SCALE = 512**-0.5


def naive(q, keys, sink) -> np.ndarray:
    """One head: `q` [512], `keys` [n, 512] float64."""
    logits = keys @ q * SCALE if len(keys) else np.zeros(0)
    top = max([sink, *logits])
    p = np.exp(logits - top)
    return (p @ keys if len(keys) else np.zeros(512)) / (p.sum() + math.exp(sink - top))


def pairs(out: np.ndarray) -> np.ndarray:
    """Channels 448 + 2i and 449 + 2i of `out` [T, h, 512] as complex numbers [T, h, 32]."""
    return out[..., 448:].copy().view(np.complex128)


def turned_back(out: np.ndarray, angle: torch.Tensor) -> np.ndarray:
    """`out` [T, h, 512] with its pairs times e^(-i·angle), `angle` [T, 32]."""
    turned = pairs(out) * np.exp(-1j * angle.double().numpy())[:, None]
    return np.concatenate((out[..., :448], turned.view(np.float64)), -1)


class Case:
    """Random latents in two caches, random index lists with holes, and a rotation for each row."""

    def __init__(self, tokens: int, heads: int = 3, compressed: int = 20, size: float = 1.0):
        self.q = torch.randn(tokens, heads, 512) * size
        self.caches = DenseLatentCache(400, rounded=False), DenseLatentCache(100, rounded=False)
        for cache in self.caches:
            cache.values.normal_()
            cache.values[0] = float("nan")  # padding rows write there; it must not reach a result
        self.window = self._slots(tokens, 128, 400)
        self.compressed = self._slots(tokens, compressed, 100)
        self.sink = torch.randn(heads)
        self.angle = torch.rand(tokens, 32) * 7

    @staticmethod
    def _slots(tokens: int, count: int, limit: int) -> torch.Tensor:
        slots = torch.randint(1, limit, (tokens, count))
        return slots.masked_fill(torch.rand(tokens, count) < 0.4, -1)

    def run(self) -> torch.Tensor:
        return sparse_mla.reference(
            self.q,
            self.caches[0],
            self.window,
            self.caches[1],
            self.compressed,
            self.sink,
            SCALE,
            self.angle.cos(),
            self.angle.sin(),
        )

    def attention(self) -> np.ndarray:
        """The output as the values' own rotation left it."""
        out = np.zeros(self.q.shape)
        for t in range(self.q.shape[0]):
            keys = [
                cache.load(slots[t][slots[t] >= 0])
                for cache, slots in zip(self.caches, (self.window, self.compressed))
                if slots is not None
            ]
            keys = torch.cat(keys).double().numpy()
            for head in range(self.q.shape[1]):
                out[t, head] = naive(self.q[t, head].double().numpy(), keys, self.sink[head].item())
        return out

    def expected(self) -> np.ndarray:
        return turned_back(self.attention(), self.angle)

    def check(self, atol: float) -> None:
        got = self.run()
        assert got.dtype == self.q.dtype
        np.testing.assert_allclose(got.double().numpy(), self.expected(), rtol=0, atol=atol)


def test_random():
    Case(6).check(2e-6)  # fp32 logits of 512 products, then a mean of values near 1


def test_no_compressed_entries():
    case = Case(4)
    case.compressed = None
    case.check(2e-6)
    case.compressed = torch.empty(4, 0, dtype=torch.int64)
    case.check(2e-6)


@pytest.mark.parametrize("sink", [-1e4, -50.0, 0.0, 50.0, 1e4])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_large_logits_and_sinks(sink, size):
    """Logits to ±1e4 and beyond: e^x overflows fp32 from 88 on. An error of 2^-24 of a logit moves
    its weight by as much."""
    case = Case(4, size=size)
    case.sink.fill_(sink)
    logits = (case.q[:, 0] @ case.caches[0].values[1:].T * SCALE).abs().max().item()
    assert logits > 1e4 or size == 1.0
    case.check(2e-6 * max(1.0, logits))


def test_sink_takes_its_share():
    case = Case(1, heads=2)
    case.sink = torch.tensor([-1e4, 1e4])
    got = case.run()
    assert got[0, 0].abs().max() > 0.1 and not got[0, 1].any()


def test_empty_windows_give_zero():
    case = Case(5)
    case.window[1], case.compressed[1] = -1, -1
    case.window[2] = -1
    case.compressed[3] = -1
    got = case.run()
    assert not got[1].any()
    case.check(2e-6)


def test_repeated_slots_count_twice():
    """A token is in the window and inside a compressed entry as well: nothing is de-duplicated."""
    case = Case(2)
    case.window[0, :2] = 7
    case.check(2e-6)


def test_blocks_of_queries_change_nothing(monkeypatch):
    case = Case(7)
    whole = case.run()
    monkeypatch.setattr(MODULE, "_MAX_GATHERED", 1)
    monkeypatch.setattr(MODULE, "_ROWS", 2)
    # other GEMM shapes, other order of sums
    torch.testing.assert_close(case.run(), whole, rtol=0, atol=1e-6)


def test_packed_caches_and_bf16_queries():
    case = Case(5)
    pages = [
        PackedLatentCache(torch.zeros(count, latent_page_bytes(slots), dtype=torch.uint8), slots)
        for count, slots in ((2, 256), (2, entries_per_page(4)))
    ]
    for page, cache in zip(pages, case.caches):
        page.store(torch.arange(1, len(cache.values)), cache.values[1:])
    case.caches = tuple(pages)
    case.q = case.q.bfloat16()
    got = case.run()
    assert got.dtype == torch.bfloat16
    # All arithmetic is fp32; attention is rounded to bf16, by up to 2^-8 of a value, so of a pair's
    # length, and pairs once more after the rotation, which keeps lengths.
    got, want = got.double().numpy(), case.expected()
    np.testing.assert_allclose(got[..., :448], want[..., :448], rtol=2**-8, atol=2e-6)
    assert (abs(pairs(got) - pairs(want)) <= 2.01 * 2**-8 * abs(pairs(want)) + 4e-6).all()


def test_no_rows():
    assert Case(0).run().shape == (0, 3, 512)


def test_a_latent_that_is_no_number_reaches_only_rows_that_list_it():
    """A request that overflowed must not spoil those that share its batch."""
    case = Case(6)
    case.window[case.window == 9] = 8
    want = case.run()
    case.window[2, 5] = 9
    case.caches[0].values[9, 3] = float("nan")
    got = case.run()
    assert got[2].isnan().any()
    others = torch.arange(6) != 2
    # values up to 4, and where memory begins decides in which order a BLAS sums
    torch.testing.assert_close(got[others], want[others], rtol=0, atol=4e-6)
