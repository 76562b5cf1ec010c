"""Routed experts against a loop over tokens and their experts in float64 (docs/model.md §3.5)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4_plugin.formats import dequantize_weight, quantize_weight_fp4, quantize_weight_fp8
from dsv4_plugin.ops import moe

from .test_shared_expert import LIMIT, naive

pytestmark = pytest.mark.usefixtures("each_form")
EXPERTS, TOPK, HIDDEN, INNER = 6, 3, 128, 256


def inputs(tokens: int, scale: float = 3.0):
    x = torch.randn(tokens, HIDDEN) * scale
    experts = torch.rand(tokens, EXPERTS).argsort(-1)[:, :TOPK]
    return x, torch.rand(tokens, TOPK) + 0.1, experts


def dense_weights():
    return (
        torch.randn(EXPERTS, INNER, HIDDEN),
        torch.randn(EXPERTS, HIDDEN, INNER),
        torch.randn(EXPERTS, INNER, HIDDEN),
    )


def loop(x, weights, experts, w1, w2, w3) -> np.ndarray:
    y = np.zeros((len(x), HIDDEN))
    for t in range(len(x)):
        for weight, e in zip(weights[t].tolist(), experts[t].tolist()):
            y[t] += weight * naive(x[t : t + 1], w1[e], w2[e], w3[e], LIMIT)[0]
    return y


def assert_close(got: torch.Tensor, want: np.ndarray) -> None:
    # Sums of 256 fp32 products, terms as large as the largest result.
    np.testing.assert_allclose(got.double().numpy(), want, atol=2e-6 * max(np.abs(want).max(), 1))


def test_dense_weights():
    x, weights, experts = inputs(40)
    w1, w2, w3 = dense_weights()
    got = moe.reference(x, weights, experts, w1, None, w2, None, w3, None, LIMIT)
    assert got.dtype == torch.float32
    assert_close(got, loop(x, weights, experts, w1, w2, w3))


@pytest.mark.parametrize(
    "quantize, scales",
    [(quantize_weight_fp4, "ue8m0"), (quantize_weight_fp8, "ue8m0"), (quantize_weight_fp8, "fp32")],
)
def test_packed_weights(quantize, scales):
    x, weights, experts = inputs(20)
    packed, dense = [], []
    for stack in dense_weights():
        pairs = [quantize(matrix) for matrix in stack]
        scale = torch.stack([pair[1].view(torch.uint8) for pair in pairs]).view(
            torch.float8_e8m0fnu
        )
        scale = scale.float() * 1.25 if scales == "fp32" else scale
        packed += [torch.stack([pair[0] for pair in pairs]), scale]
        dense.append(torch.stack([dequantize_weight(w, s) for w, s in zip(packed[-2], scale)]))
    assert_close(
        moe.reference(x, weights, experts, *packed, LIMIT), loop(x, weights, experts, *dense)
    )


def test_shares_of_the_experts_add_up():
    """Two processes with half of the experts each: experts of the other contribute nothing."""
    x, weights, experts = inputs(30)
    w1, w2, w3 = dense_weights()
    whole = moe.reference(x, weights, experts, w1, None, w2, None, w3, None, LIMIT)
    half = EXPERTS // 2
    parts = [
        moe.reference(
            x, weights, experts, w1[s], None, w2[s], None, w3[s], None, LIMIT, first_expert=s.start
        )
        for s in (slice(0, half), slice(half, EXPERTS))
    ]
    assert (parts[0] != whole).any() and (parts[1] != whole).any()
    # order of sums
    torch.testing.assert_close(
        parts[0] + parts[1], whole, rtol=0, atol=2e-6 * whole.abs().max().item()
    )


def test_no_local_expert_and_no_rows():
    w1, w2, w3 = dense_weights()
    x, weights, experts = inputs(4)
    assert not moe.reference(
        x, weights, experts, w1, None, w2, None, w3, None, LIMIT, first_expert=EXPERTS
    ).any()
    assert moe.reference(*inputs(0), w1, None, w2, None, w3, None, LIMIT).shape == (0, HIDDEN)


def test_weight_multiplies_before_the_last_rounding():
    """In bf16 the weighted activation is rounded once before w2, as in the reference
    implementation."""
    x, weights, experts = inputs(12, scale=1.0)
    w1, w2, w3 = (w.bfloat16() for w in dense_weights())
    got = moe.reference(x.bfloat16(), weights, experts, w1, None, w2, None, w3, None, LIMIT)
    want = loop(x.bfloat16(), weights, experts, w1, w2, w3)
    # bf16 GEMM outputs and hidden values: 2^-8 each on terms that partly cancel in sums of 256.
    np.testing.assert_allclose(got.double().numpy(), want, atol=2**-6 * np.abs(want).max())
