"""Compressed entries against direct computation from the whole token history in float64
(docs/model.md §3.3)."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from dsv4_plugin.cache import DenseIndexCache, DenseLatentCache, entries_per_page
from dsv4_plugin.ops import build_step_plan, compress
from dsv4_plugin.ops.rope import rotation

from .tables import Request, Tables

pytestmark = pytest.mark.usefixtures("each_form")
EPS = 1e-6
FREQUENCIES = 160000.0 ** -(torch.arange(0, 64, 2) / 64)
KINDS = pytest.mark.parametrize("ratio, dim", [(4, 512), (4, 128), (128, 512)])


class History:
    """Projections of every token of some requests, and the entries they must give."""

    def __init__(self, lengths: list[int], ratio: int, dim: int):
        self.ratio, self.dim, self.width = ratio, dim, dim * (2 if ratio == 4 else 1)
        self.projected = [torch.randn(length, 2 * self.width) for length in lengths]
        self.ape = torch.randn(ratio, self.width)
        self.weight = torch.rand(dim) + 0.5

    def entry(self, request: int, index: int) -> np.ndarray:
        """Entry `index` by docs/model.md §3.3: the a-half of the tokens before the window and the
        b-half of its own."""
        history, ape = self.projected[request].double().numpy(), self.ape.double().numpy()
        k, z = history[:, : self.width], history[:, self.width :]
        own = slice(self.width - self.dim, self.width)
        values, scores = [], []
        for i in range(self.ratio):
            if self.ratio == 4 and index > 0:
                t = 4 * index - 4 + i
                values.append(k[t, : self.dim])
                scores.append(z[t, : self.dim] + ape[i, : self.dim])
            t = self.ratio * index + i
            values.append(k[t, own])
            scores.append(z[t, own] + ape[i, own])
        weights = np.exp(np.array(scores) - np.max(scores, 0))
        c = (weights / weights.sum(0) * np.array(values)).sum(0)
        c = c * self.weight.double().numpy() / math.sqrt((c * c).mean() + EPS)
        angles = self.ratio * index * FREQUENCIES.double().numpy()
        pairs = (c[-64::2] + 1j * c[-63::2]) * np.exp(1j * angles)
        c[-64::2], c[-63::2] = pairs.real, pairs.imag
        return c

    def make_cache(self, pages: int):
        slots = pages * entries_per_page(self.ratio)
        store = DenseIndexCache if self.dim == 128 else DenseLatentCache
        return store(slots, rounded=False)

    def make_ring(self, tables: Tables) -> torch.Tensor:
        """Nothing is cleared between requests: a row that this sequence did not write may hold
        anything."""
        rows = tables.pages * 8 if self.ratio == 4 else (max(tables.row, default=0) + 1) * 128
        return torch.full((rows, 2 * self.width), float("nan"))

    def step(
        self, tables: Tables, ring: torch.Tensor, cache, rotate: bool = False, dtype=torch.float32
    ):
        rows = build_step_plan.reference(**tables.arguments()).compression[self.ratio]
        projected = torch.cat(
            [
                self.projected[index][request.prefix : request.after]
                for index, request in enumerate(tables.requests)
            ]
            or [torch.empty(0, 2 * self.width)]
        )
        cos, sin = rotation(rows.position, FREQUENCIES)
        compress.reference(
            projected, ring, rows, self.ape, self.weight, EPS, cos, sin, cache, dtype, rotate
        )
        return rows

    def assert_entries(self, tables: Tables, cache) -> None:
        for index, request in enumerate(tables.requests):
            for w in range(request.after // self.ratio):
                slot = tables.full(index, self.ratio * w) // self.ratio
                # fp32 softmax and sums of values near 1, and angles of up to 600 radians rounded to
                # fp32.
                np.testing.assert_allclose(
                    cache.load(torch.tensor([slot]))[0].double().numpy(),
                    self.entry(index, w),
                    rtol=0,
                    atol=1e-4,
                )


def chunks(lengths: list[int], seed: int) -> list[list[Request]]:
    """Steps that bring all requests to their lengths, ragged and irregular, on the same pages."""
    chance, done, steps = random.Random(seed), [0] * len(lengths), []
    while done != lengths:
        new = [
            min(chance.choice([0, 1, 1, 2, 3, 5, 7, 121, 130]), length - n)
            for n, length in zip(done, lengths)
        ]
        steps.append([Request(n, count) for n, count in zip(done, new)])
        done = [n + count for n, count in zip(done, new)]
    return steps


@KINDS
@pytest.mark.parametrize("seed", [0, 1])
def test_any_chunks_give_the_entries_of_the_history(ratio, dim, seed):
    lengths = [300, 5, 131, 263]
    history = History(lengths, ratio, dim)
    whole = Tables([Request(0, length) for length in lengths], seed)
    ring, cache = history.make_ring(whole), history.make_cache(whole.pages)
    for requests in chunks(lengths, seed):
        history.step(whole.at(requests), ring, cache)
    history.assert_entries(whole, cache)


@KINDS
def test_one_chunk(ratio, dim):
    history = History([270, 3, 128], ratio, dim)
    tables = Tables([Request(0, 270), Request(0, 3), Request(0, 128)])
    cache = history.make_cache(tables.pages)
    history.step(tables, history.make_ring(tables), cache)
    history.assert_entries(tables, cache)


@KINDS
def test_a_shared_page_carries_its_own_overlap(ratio, dim):
    """A request that starts after another's page of 256 finds the last four tokens of that page in
    the page's ring."""
    history = History([256 + 40, 256 + 20], ratio, dim)
    history.projected[1][:256] = history.projected[0][:256]
    whole = Tables([Request(0, 296), Request(256, 20, shared=1)])
    ring, cache = history.make_ring(whole), history.make_cache(whole.pages)
    history.step(whole.at([Request(0, 296), Request(256, 0, shared=1)]), ring, cache)
    history.step(whole.at([Request(296, 0), Request(256, 20, shared=1)]), ring, cache)
    history.assert_entries(whole, cache)


def test_rotated_index_keys():
    from scipy.linalg import hadamard

    history = History([40], 4, 128)
    tables = Tables([Request(0, 40)])
    cache = history.make_cache(tables.pages)
    history.step(tables, history.make_ring(tables), cache, rotate=True)
    for w in range(10):
        got = cache.load(torch.tensor([tables.full(0, 4 * w) // 4]))[0].double().numpy()
        np.testing.assert_allclose(
            got, history.entry(0, w) @ hadamard(128) / math.sqrt(128), rtol=0, atol=1e-4
        )


def test_pooled_entry_is_rounded_before_the_norm():
    history = History([128], 128, 512)
    tables = Tables([Request(0, 128)])
    caches = [history.make_cache(tables.pages) for _ in range(2)]
    for cache, dtype in zip(caches, (torch.float32, torch.bfloat16)):
        history.step(tables, history.make_ring(tables), cache, dtype=dtype)
    slot = torch.tensor([tables.full(0, 0) // 128])
    exact, rounded = (cache.load(slot) for cache in caches)
    assert torch.equal(rounded, rounded.bfloat16().float()) and not torch.equal(exact, rounded)
    # three bf16 roundings: pool, norm, RoPE
    torch.testing.assert_close(rounded, exact, rtol=2**-6, atol=2**-6)


@KINDS
@pytest.mark.parametrize("scale", [0.0, 200.0])
def test_extreme_scores(ratio, dim, scale):
    history = History([ratio * 2], ratio, dim)
    history.projected[0][:, history.width :] *= scale
    tables = Tables([Request(0, ratio * 2)])
    cache = history.make_cache(tables.pages)
    history.step(tables, history.make_ring(tables), cache)
    history.assert_entries(tables, cache)


@KINDS
def test_window_without_any_score_gives_zero(ratio, dim):
    """Empty state is k = 0, score = -inf; nothing but that in a window must give 0, not NaN."""
    history = History([ratio * 2], ratio, dim)
    history.projected[0][:, history.width :] = float("-inf")
    tables = Tables([Request(0, ratio * 2)])
    cache = history.make_cache(tables.pages)
    cache.values.fill_(7.0)
    rows = history.step(tables, history.make_ring(tables), cache)
    assert not cache.load(rows.slots).any()


@KINDS
def test_no_rows_touch_nothing(ratio, dim):
    history = History([300], ratio, dim)
    for requests in ([], [Request(300, 0)]):
        tables = Tables(requests)
        ring, cache = history.make_ring(tables), history.make_cache(tables.pages)
        history.projected = [torch.randn(300, 2 * history.width)] if requests else []
        history.step(tables, ring, cache)
        assert ring.isnan().all() and not cache.values.any()


@KINDS
def test_only_needed_rows_are_kept(ratio, dim):
    """The ring must not take every row of a chunk: rows alias each 8 or 128 positions."""
    history = History([300], ratio, dim)
    tables = Tables([Request(0, 300)])
    ring = history.make_ring(tables)
    rows = history.step(tables, ring, history.make_cache(tables.pages))
    written = ~ring.isnan().any(1)
    assert written.sum().item() == (rows.ring_write_row >= 0).sum().item()
    kept = rows.ring_write_row >= 0
    assert torch.equal(ring[rows.ring_write_row[kept]], history.projected[0][kept])
