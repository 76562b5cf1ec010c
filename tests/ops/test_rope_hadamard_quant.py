"""Indexer queries against scipy's Hadamard matrix and tables of the formats (docs/model.md §3.4,
§6)."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from dsv4_plugin.ops import rope_hadamard_quant

MATRIX = hadamard(128) / math.sqrt(128)
FACTOR = 128**-0.5 * 4**-0.5
"""Of the weights of four heads (docs/model.md §3.4)."""


def turned(q: torch.Tensor, angle: torch.Tensor) -> np.ndarray:
    """float64 [T, n, 128]: RoPE on the last 64 dimensions, then the Hadamard rotation."""
    pairs = torch.view_as_complex(q[..., 64:].double().unflatten(-1, (32, 2)).contiguous())
    pairs = pairs * torch.polar(torch.ones_like(angle.double()), angle.double()).unsqueeze(1)
    return (
        torch.cat((q[..., :64].double(), torch.view_as_real(pairs).flatten(-2)), -1).numpy()
        @ MATRIX
    )


def inputs(tokens: int = 5, dtype=torch.float32):
    return torch.randn(tokens, 4, 128).to(dtype), torch.randn(tokens, 4), torch.rand(tokens, 32) * 7


def test_rotation_alone():
    q, weights, angle = inputs()
    got, same = rope_hadamard_quant.reference(q, weights, angle.cos(), angle.sin(), "none")
    # fp32 sums of 128 terms up to 5
    np.testing.assert_allclose(got.double().numpy(), turned(q, angle), atol=3e-6)
    assert torch.equal(same, weights * FACTOR)


def test_rotation_cancels_in_scores():
    """Without rounding, q·k is what it was: the rotation only spreads the values for the
    quantiser."""
    q, weights, _ = inputs()
    still = torch.zeros(5, 32)
    rotated, _ = rope_hadamard_quant.reference(q, weights, still.cos(), still.sin(), "none")
    want = q[:, 0] @ q[:, 1].T
    # sums of 128 terms near 1
    torch.testing.assert_close(rotated[:, 0] @ rotated[:, 1].T, want, rtol=0, atol=1e-4)


def test_fp4():
    q, weights, angle = inputs()
    exact, _ = rope_hadamard_quant.reference(q, weights, angle.cos(), angle.sin(), "none")
    got, same = rope_hadamard_quant.reference(q, weights, angle.cos(), angle.sin(), "fp4")
    assert torch.equal(same, weights * FACTOR)
    for x, y in zip(exact.view(-1, 32).numpy(), got.view(-1, 32).numpy()):
        scale = 2.0 ** math.ceil(math.log2(np.abs(x).max() / 6))
        want = (x / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
        assert np.array_equal(y, want)


def test_fp8_moves_the_scale_into_the_weights():
    q, weights, angle = inputs()
    exact, _ = rope_hadamard_quant.reference(q, weights, angle.cos(), angle.sin(), "none")
    values, scaled = rope_hadamard_quant.reference(q, weights, angle.cos(), angle.sin(), "fp8")
    assert values.dtype == torch.float8_e4m3fn
    for t in range(5):
        for head in range(4):
            x = exact[t, head].numpy()
            scale = 2.0 ** math.ceil(math.log2(np.abs(x).max() / 448))
            assert scaled[t, head] == weights[t, head] * FACTOR * scale
            codes = (x / np.float32(scale)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            assert np.array_equal(values[t, head].view(torch.uint8).numpy(), codes)


@pytest.mark.parametrize("rounding", ["none", "fp4", "fp8"])
def test_no_rows(rounding):
    q, weights, angle = inputs(0)
    got, scaled = rope_hadamard_quant.reference(q, weights, angle.cos(), angle.sin(), rounding)
    assert got.shape == (0, 4, 128) and scaled.shape == (0, 4)


@pytest.mark.parametrize("rounding", ["none", "fp4", "fp8"])
def test_zero_query(rounding):
    angle = torch.zeros(1, 32)
    got, scaled = rope_hadamard_quant.reference(
        torch.zeros(1, 4, 128), torch.ones(1, 4), angle.cos(), angle.sin(), rounding
    )
    assert not got.float().any() and scaled.isfinite().all()
