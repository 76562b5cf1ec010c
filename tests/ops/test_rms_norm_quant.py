"""RMSNorm and its FP8 against float64 and ml_dtypes (docs/model.md §3, §6)."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from dsv4_plugin.ops import rms_norm_quant
from dsv4_plugin.ops.rms_norm_quant import rms_norm


def naive(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return (
        np.stack([row * weight / math.sqrt(np.mean(row * row) + eps) for row in x]) if len(x) else x
    )


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4, 0.0])
def test_float64(scale):
    x, weight = torch.randn(9, 384) * scale, torch.randn(384)
    got = rms_norm(x, weight, 1e-6)
    # A mean of 384 squares, a root and two products in fp32.
    np.testing.assert_allclose(
        got.double().numpy(),
        naive(x.double().numpy(), weight.double().numpy(), 1e-6),
        rtol=2e-6,
        atol=1e-30,
    )


def test_without_weight_and_in_bf16():
    x = torch.randn(4, 6, 512).bfloat16()
    want = naive(x.double().flatten(0, 1).numpy(), np.ones(512), 1e-6)
    got = rms_norm(x, None, 1e-6)
    assert got.dtype == torch.bfloat16
    # Statistics are fp32 whatever the input, so only the result is rounded to bf16: half a unit of
    # 2^-8.
    np.testing.assert_allclose(got.double().flatten(0, 1).numpy(), want, rtol=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_of_the_normed_rows(dtype):
    x, weight = torch.randn(5, 512).to(dtype), torch.randn(512).to(dtype)
    x[1] *= 1e-9  # amax below the floor of 1e-4
    y, values, scale = rms_norm_quant.reference(x, weight, 1e-6, "both")
    assert torch.equal(y, rms_norm(x, weight, 1e-6))
    for row in range(5):
        for block in range(4):
            part = y[row, block * 128 : (block + 1) * 128].float().numpy()
            want = 2.0 ** math.ceil(math.log2(max(float(np.abs(part).max()), 1e-4) / 448))
            assert scale[row, block] == want
            codes = (part / np.float32(want)).astype(ml_dtypes.float8_e4m3fn)
            assert np.array_equal(
                values[row, block * 128 : (block + 1) * 128].view(torch.uint8).numpy(),
                codes.view(np.uint8),
            )


def test_no_rows():
    y, values, scale = rms_norm_quant.reference(torch.empty(0, 256), torch.ones(256), 1e-6, "both")
    assert y.shape == values.shape == (0, 256) and scale.shape == (0, 2)


def test_keeps_what_is_asked_for():
    x, weight = torch.randn(3, 256), torch.rand(256)
    both = rms_norm_quant.reference(x, weight, 1e-6, "both")
    normed = rms_norm_quant.reference(x, weight, 1e-6, "normed")
    fp8 = rms_norm_quant.reference(x, weight, 1e-6, "fp8")
    assert torch.equal(normed[0], both[0]) and normed[1:] == (None, None)
    assert fp8[0] is None and all(
        torch.equal(a.float(), b.float()) for a, b in zip(fp8[1:], both[1:])
    )
