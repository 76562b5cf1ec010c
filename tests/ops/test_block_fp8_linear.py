"""Products with released FP8 weights against a loop over blocks (docs/model.md §2)."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.formats import dequantize_fp8, quantize_fp8, quantize_weight_fp8
from dsv4_plugin.ops import block_fp8_linear, linear_fp32


def naive(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each 128x128 block times its scale, float64."""
    out = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, columns = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
            out[:, rows] += (
                x[:, columns].double() @ (weight[rows, columns].double() * scale[i, j].double()).T
            )
    return out


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (64, 513), (257, 128)])
@pytest.mark.parametrize("scales", ["ue8m0", "fp32"])
def test_blocks(shape, scales):
    weight, scale = quantize_weight_fp8(
        torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]
    )
    if scales == "fp32":
        scale = scale.float() * (0.5 + torch.rand(scale.shape))
    x = torch.randn(6, shape[1])
    want = naive(x, weight, scale)
    got = block_fp8_linear.reference(x, weight, scale)
    # fp32 sums of up to 513 products: the error grows with the largest row, not with each result.
    assert (got - want).abs().max() <= 2e-6 * want.abs().max()


def test_dense_keeps_the_dtype():
    x, weight = torch.randn(3, 256).bfloat16(), torch.randn(128, 256).bfloat16()
    got = block_fp8_linear.reference(x, weight)
    assert got.dtype == torch.bfloat16
    want = x.double() @ weight.double().T
    # One rounding of the result to bf16, and fp32 sums below it.
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


def test_fp32_product_of_bf16_inputs_is_not_rounded():
    x, weight = torch.randn(3, 256).bfloat16(), torch.randn(128, 256).bfloat16()
    got = linear_fp32(x, weight)
    assert got.dtype == torch.float32
    # fp32 sums, terms to 10
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T, rtol=0, atol=1e-4)
    assert (got != got.bfloat16()).any()


def test_fp8_inputs_stand_for_their_values():
    weight, scale = quantize_weight_fp8(torch.randn(192, 256))
    x, x_scale = quantize_fp8(torch.randn(5, 256), 128)
    got = block_fp8_linear.reference(x, weight, scale, x_scale)
    want = naive(dequantize_fp8(x, x_scale), weight, scale)
    assert got.dtype == torch.bfloat16
    # one rounding to bf16 of fp32 sums
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


def test_parts():
    x, weight = torch.randn(4, 256), torch.randn(200, 256)
    for run in (block_fp8_linear.reference, linear_fp32.reference):
        parts = run(x, weight, parts=(128, 72))
        assert [part.shape for part in parts] == [(4, 128), (4, 72)]
        assert torch.equal(torch.cat(parts, -1), run(x, weight))


def test_no_rows():
    weight, scale = quantize_weight_fp8(torch.randn(200, 300))
    assert block_fp8_linear.reference(torch.empty(0, 300), weight, scale).shape == (0, 200)
    assert block_fp8_linear.reference(torch.empty(0, 300), torch.randn(200, 300)).shape == (0, 200)
