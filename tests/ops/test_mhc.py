"""Hyper-connections, one stream at a time in float64 (docs/model.md §3.1, §3.6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4_plugin.formats import quantize_fp8
from dsv4_plugin.ops import mhc_head, mhc_post, mhc_post_pre, mhc_pre
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


def normed(x, weight):
    """RMSNorm of float64 rows."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPS) * weight


def pre(streams, fn, base, scale, weight, iterations=20, quantize=False):
    return mhc_pre.reference(streams, fn, base, scale, weight, iterations, EPS, NORM_EPS, quantize)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_pre(iterations):
    streams, (fn, base, scale) = torch.randn(5, N, D), parameters(24, 3)
    weight = torch.randn(D)
    x, codes, x_scale, post, comb = pre(streams, fn, base, scale, weight, iterations)
    assert codes is None and x_scale is None
    h, fn, base, scale, weight = (t.double().numpy() for t in (streams, fn, base, scale, weight))
    for t in range(5):
        m = mixes(h[t], fn)
        gate = sigmoid(m[:4] * scale[0] + base[:4]) + EPS
        want_comb = naive_sinkhorn((m[8:] * scale[2] + base[8:]).reshape(4, 4), iterations)
        # fp32 sums of 384 products; Sinkhorn contracts errors.
        np.testing.assert_allclose(
            x[t].double().numpy(),
            normed(sum(gate[j] * h[t, j] for j in range(4)), weight),
            atol=1e-5,
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
    weight = torch.randn(D)
    got = mhc_head.reference(streams, fn, base, scale, weight, EPS, NORM_EPS)
    h, fn, base, scale, weight = (t.double().numpy() for t in (streams, fn, base, scale, weight))
    for t in range(5):
        pre = sigmoid(mixes(h[t], fn) * scale[0] + base) + EPS
        np.testing.assert_allclose(
            got[t].double().numpy(),
            normed(sum(pre[j] * h[t, j] for j in range(4)), weight),
            atol=1e-5,
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
    weight = torch.ones(D)
    x, _, _, post, comb = pre(streams, fn, base, scale, weight)
    gates = mhc_pre.reference(streams.float(), fn, base, scale, weight, 20, EPS, NORM_EPS, False)
    assert torch.equal(post, gates[3]) and torch.equal(comb, gates[4])
    h, fn, base, scale = (t.double().numpy() for t in (streams, fn, base, scale))
    for t in range(5):
        gate = sigmoid(mixes(h[t], fn)[:4] * scale[0] + base[:4]) + EPS
        want = normed(sum(gate[j] * h[t, j] for j in range(4)), 1.0)
        # the collapsed row and the normed one are rounded to bf16: 2^-9 each
        np.testing.assert_allclose(x[t].double().numpy(), want, rtol=2**-7, atol=1e-5)
    assert x.dtype == torch.bfloat16
    y = torch.randn(5, D).bfloat16()
    got = mhc_post.reference(y, streams, post, comb)
    assert torch.equal(got, mhc_post.reference(y.float(), streams.float(), post, comb).bfloat16())


def test_between_sub_layers_is_post_then_pre():
    streams, site = (
        torch.randn(5, N, 128),
        (torch.randn(24, N * 128), torch.randn(24), torch.rand(3)),
    )
    y, post, comb, weight = (
        torch.randn(5, 128),
        torch.rand(5, N),
        torch.rand(5, N, N),
        torch.rand(128),
    )
    tail = (*site, weight, 20, EPS, NORM_EPS, True)
    got = mhc_post_pre.reference(y, streams, post, comb, *tail)
    after = mhc_post.reference(y, streams, post, comb)
    for one, other in zip(got, (after, *mhc_pre.reference(after, *tail))):
        assert torch.equal(one.float(), other.float())
    x, codes, x_scale = got[1:4]
    want_codes, want_scale = quantize_fp8(x, 128)
    assert torch.equal(codes.float(), want_codes.float()) and torch.equal(x_scale, want_scale)


def test_no_rows():
    fn, base, scale = parameters(24, 3)
    empty, weight = torch.empty(0, N, D), torch.ones(D)
    x, _, _, post, comb = pre(empty, fn, base, scale, weight)
    assert (x.shape, post.shape, comb.shape) == ((0, D), (0, N), (0, N, N))
    assert mhc_post.reference(x, empty, post, comb).shape == (0, N, D)
    head = mhc_head.reference(empty, *parameters(4, 1), weight, EPS, NORM_EPS)
    assert head.shape == (0, D)
