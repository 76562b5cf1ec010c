"""Hyper-connections, one stream at a time in float64 (docs/model.md §3.1, §3.6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4_plugin.ops import mhc_head, mhc_post, mhc_pre
from dsv4_plugin.ops.mhc import sinkhorn

EPS, NORM_EPS, N, D = 1e-6, 1e-5, 4, 96


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mixes(streams, fn):
    x = streams.reshape(-1)
    return fn @ x / np.sqrt((x * x).mean() + NORM_EPS)


def naive_sinkhorn(c, iterations):
    c = np.exp(c - c.max(1, keepdims=True))
    c = c / c.sum(1, keepdims=True) + EPS
    c = c / (c.sum(0, keepdims=True) + EPS)
    for _ in range(iterations - 1):
        c = c / (c.sum(1, keepdims=True) + EPS)
        c = c / (c.sum(0, keepdims=True) + EPS)
    return c


def parameters(rows: int, scales: int):
    return torch.randn(rows, N * D) * (N * D) ** -0.5, torch.randn(rows), torch.randn(scales)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_pre(iterations):
    streams, (fn, base, scale) = torch.randn(5, N, D), parameters(24, 3)
    x, post, comb = mhc_pre.reference(streams, fn, base, scale, iterations, EPS, NORM_EPS)
    h, fn, base, scale = (t.double().numpy() for t in (streams, fn, base, scale))
    for t in range(5):
        m = mixes(h[t], fn)
        pre = sigmoid(m[:4] * scale[0] + base[:4]) + EPS
        want_comb = naive_sinkhorn((m[8:] * scale[2] + base[8:]).reshape(4, 4), iterations)
        # fp32 sums of 384 products; Sinkhorn contracts errors.
        np.testing.assert_allclose(
            x[t].double().numpy(), sum(pre[j] * h[t, j] for j in range(4)), atol=3e-6
        )
        np.testing.assert_allclose(
            post[t].double().numpy(), 2 * sigmoid(m[4:8] * scale[1] + base[4:8]), atol=2e-6
        )
        np.testing.assert_allclose(comb[t].double().numpy(), want_comb, atol=2e-6)


def test_post_sums_over_the_first_index():
    y, streams, post, comb = (
        torch.randn(3, D),
        torch.randn(3, N, D),
        torch.rand(3, N),
        torch.rand(3, N, N),
    )
    got = mhc_post.reference(y, streams, post, comb)
    for t in range(3):
        for k in range(N):
            want = post[t, k].double() * y[t].double()
            for j in range(N):
                want = want + comb[t, j, k].double() * streams[t, j].double()
            # five fp32 terms near 1
            torch.testing.assert_close(got[t, k].double(), want, rtol=0, atol=2e-6)


def test_head():
    streams, (fn, base, scale) = torch.randn(5, N, D), parameters(4, 1)
    got = mhc_head.reference(streams, fn, base, scale, EPS, NORM_EPS)
    h, fn, base, scale = (t.double().numpy() for t in (streams, fn, base, scale))
    for t in range(5):
        pre = sigmoid(mixes(h[t], fn) * scale[0] + base) + EPS
        np.testing.assert_allclose(
            got[t].double().numpy(), sum(pre[j] * h[t, j] for j in range(4)), atol=3e-6
        )


@pytest.mark.parametrize("spread, rows", [(0.1, 1e-5), (1.0, 1e-3)])
def test_sinkhorn_is_doubly_stochastic(spread, rows):
    c = sinkhorn(torch.randn(200, 4, 4) * spread, 20, EPS)
    assert (c > 0).all()
    # Columns are divided last: 1 to eps. Rows converge; the wider the logits the slower.
    torch.testing.assert_close(c.sum(-2), torch.ones(200, 4), rtol=0, atol=5e-6)
    assert (c.sum(-1) - 1).abs().max() < rows
    assert (c.sum((-2, -1)) - 4).abs().max() < 2e-5


@pytest.mark.parametrize("extreme", [60.0, 1e4])
def test_extreme_logits_stay_finite(extreme):
    c = sinkhorn(torch.randn(50, 4, 4).sign() * extreme, 20, EPS)
    assert c.isfinite().all() and (c >= 0).all()


def test_bf16_streams_are_mixed_in_fp32():
    streams, (fn, base, scale) = torch.randn(5, N, D).bfloat16(), parameters(24, 3)
    x, post, comb = mhc_pre.reference(streams, fn, base, scale, 20, EPS, NORM_EPS)
    want = mhc_pre.reference(streams.float(), fn, base, scale, 20, EPS, NORM_EPS)
    assert x.dtype == torch.bfloat16 and torch.equal(x, want[0].bfloat16())
    assert torch.equal(post, want[1]) and torch.equal(comb, want[2])
    y = torch.randn(5, D).bfloat16()
    got = mhc_post.reference(y, streams, post, comb)
    assert torch.equal(got, mhc_post.reference(y.float(), streams.float(), post, comb).bfloat16())


def test_no_rows():
    fn, base, scale = parameters(24, 3)
    empty = torch.empty(0, N, D)
    x, post, comb = mhc_pre.reference(empty, fn, base, scale, 20, EPS, NORM_EPS)
    assert (x.shape, post.shape, comb.shape) == ((0, D), (0, N), (0, N, N))
    assert mhc_post.reference(x, empty, post, comb).shape == (0, N, D)
    assert mhc_head.reference(empty, *parameters(4, 1), EPS, NORM_EPS).shape == (0, D)
