"""The clamped SwiGLU and the shared expert, one value at a time in float64 (docs/model.md §3.5)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dsv4_plugin.formats import dequantize_weight, quantize_weight_fp8
from dsv4_plugin.ops import shared_expert
from dsv4_plugin.ops.shared_expert import swiglu

LIMIT = 10.0


def activation(gate: float, up: float, limit: float) -> float:
    a = min(gate, limit)  # the gate is clamped from above only
    sigmoid = 1 / (1 + math.exp(-a)) if a > -700 else 0.0
    return a * sigmoid * max(-limit, min(up, limit))


def naive(x, w1, w2, w3, limit):
    x, w1, w2, w3 = (t.double().numpy() for t in (x, w1, w2, w3))
    hidden = np.array([[activation(g, u, limit) for g, u in zip(w1 @ row, w3 @ row)] for row in x])
    return hidden.reshape(len(x), -1) @ w2.T


@pytest.mark.parametrize("gate", [-1e4, -50.0, -10.0, -1.0, 0.0, 3.0, 9.99, 10.0, 10.5, 1e4])
@pytest.mark.parametrize("up", [-1e4, -10.5, -10.0, -2.0, 0.0, 9.0, 10.0, 1e4])
def test_clamp(gate, up):
    got = swiglu(torch.tensor([gate]), torch.tensor([up]), LIMIT).item()
    # a few fp32 roundings
    assert got == pytest.approx(activation(gate, up, LIMIT), rel=1e-6, abs=1e-18)


@pytest.mark.parametrize("limit", [0.5, 10.0])
def test_shared_expert_is_clamped(limit):
    x, w1, w2, w3 = (
        torch.randn(7, 128) * 4,
        torch.randn(256, 128),
        torch.randn(128, 256),
        torch.randn(256, 128),
    )
    assert ((x @ w1.T).abs() > limit).any() and ((x @ w3.T).abs() > limit).any()
    want = naive(x, w1, w2, w3, limit)
    got = shared_expert.reference(x, w1, None, w2, None, w3, None, limit)
    # Gate and up are fp32 sums of 128 products near 4, whose errors near 4e-6 pass through a sum of
    # 256.
    np.testing.assert_allclose(got.double().numpy(), want, atol=5e-6 * np.abs(want).max())
    unclamped = naive(x, w1, w2, w3, 1e9)
    assert np.abs(want - unclamped).max() > 1.0  # the clamp matters on these inputs


def test_packed_weights():
    pairs = [
        quantize_weight_fp8(torch.randn(shape)) for shape in ((256, 128), (128, 256), (256, 128))
    ]
    x = torch.randn(5, 128)
    dense = [dequantize_weight(*pair) for pair in pairs]
    got = shared_expert.reference(x, *[tensor for pair in pairs for tensor in pair], LIMIT)
    assert torch.equal(
        got, shared_expert.reference(x, dense[0], None, dense[1], None, dense[2], None, LIMIT)
    )


def test_bf16_activation_is_computed_in_fp32():
    gate, up = torch.randn(4, 64).bfloat16() * 8, torch.randn(4, 64).bfloat16() * 8
    assert torch.equal(swiglu(gate, up, LIMIT), swiglu(gate.float(), up.float(), LIMIT))


def test_no_rows():
    got = shared_expert.reference(
        torch.empty(0, 128),
        torch.randn(64, 128),
        None,
        torch.randn(128, 64),
        None,
        torch.randn(64, 128),
        None,
        LIMIT,
    )
    assert got.shape == (0, 128)
