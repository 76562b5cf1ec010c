"""The grouped projection, one group at a time in float64 (docs/model.md §3.2)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4_plugin.formats import dequantize_weight, quantize_fp8, quantize_weight_fp8
from dsv4_plugin.ops import grouped_output


def naive(o: torch.Tensor, weight: torch.Tensor, groups: int) -> np.ndarray:
    tokens, heads = o.shape[:2]
    rank = weight.shape[0] // groups
    o, weight = o.double().numpy(), weight.double().numpy()
    out = np.zeros((tokens, groups * rank))
    for t in range(tokens):
        for g in range(groups):
            x = o[t, g * heads // groups : (g + 1) * heads // groups].reshape(-1)
            out[t, g * rank : (g + 1) * rank] = weight[g * rank : (g + 1) * rank] @ x
    return out


@pytest.mark.parametrize("heads, groups, rank", [(4, 2, 128), (8, 8, 64), (6, 1, 128), (8, 4, 128)])
def test_groups(heads, groups, rank):
    o = torch.randn(5, heads, 512)
    weight = torch.randn(groups * rank, heads // groups * 512)
    got = grouped_output.reference(o, weight, None, groups)
    # fp32 sums of up to 3072 products near 1.
    np.testing.assert_allclose(got.double().numpy(), naive(o, weight, groups), atol=3e-4)


def test_packed_weight():
    o = torch.randn(5, 4, 512)
    weight, scale = quantize_weight_fp8(torch.randn(256, 1024))
    got = grouped_output.reference(o, weight, scale, 2)
    np.testing.assert_allclose(
        got.double().numpy(), naive(o, dequantize_weight(weight, scale), 2), atol=3e-4
    )


def test_fp8_for_the_next_product():
    o, weight = torch.randn(5, 4, 512), torch.randn(256, 1024)
    z = grouped_output.reference(o, weight, None, 2)
    codes, scale = grouped_output.reference(o, weight, None, 2, True)
    want_codes, want_scale = quantize_fp8(z, 128)
    assert torch.equal(codes.float(), want_codes.float()) and torch.equal(scale, want_scale)


def test_no_rows():
    got = grouped_output.reference(torch.empty(0, 4, 512), torch.randn(256, 1024), None, 2)
    assert got.shape == (0, 256)
