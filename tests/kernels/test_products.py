"""The products of the projections in Triton: block_fp8_linear, linear_fp32, grouped_output."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.formats import dequantize_fp8, dequantize_weight, quantize_fp8, quantize_weight_fp8
from dsv4_plugin.kernels.triton import product
from dsv4_plugin.kernels.triton.block_fp8_linear import block_fp8_linear as fp8_kernel
from dsv4_plugin.kernels.triton.grouped_output import grouped_output as grouped_kernel
from dsv4_plugin.kernels.triton.linear_fp32 import linear_fp32 as fp32_kernel
from dsv4_plugin.ops import block_fp8_linear, linear_fp32


def make_x(tokens: int, inputs: int, scale: float = 1.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(tokens)
    return (torch.randn(tokens, inputs, generator=random) * scale).bfloat16()


def make_weight(rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed, blocks of very different scales."""
    random = torch.Generator().manual_seed(rows)
    spread = torch.logspace(-2, 1, rows)[:, None] * torch.logspace(0, -2, inputs)
    return quantize_weight_fp8(torch.randn(rows, inputs, generator=random) * spread)


def exact(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 product of `x` [T, n], rounded to FP8 as the release does, with a packed weight."""
    rounded = dequantize_fp8(*quantize_fp8(x, 128)).double()
    return rounded @ dequantize_weight(weight, scale).double().T


def assert_rounded(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor) -> None:
    """bf16 `got` is `want` (float64) rounded once, 2^-8 of it, after fp32 sums of some thousand
    terms of the size of `size`: 2^-18 of that."""
    assert got.isfinite().all()
    assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 2**-18 * size).all()


@pytest.mark.parametrize(
    "tokens, rows, inputs",
    [(1, 128, 128), (5, 192, 1792), (70, 64, 256), (3, 320, 384)],
    ids=["one block", "split", "quantised before", "rows past a block"],
)
@pytest.mark.parametrize("scales", ["ue8m0", "fp32"])
def test_fp8(tokens, rows, inputs, scales):
    x, (weight, scale) = make_x(tokens, inputs), make_weight(rows, inputs)
    if scales == "fp32":
        scale = scale.float() * (0.5 + torch.rand(scale.shape))
    want = exact(x, weight, scale)
    size = x.abs().double() @ dequantize_weight(weight, scale).abs().double().T
    assert_rounded(fp8_kernel(x, weight, scale), want, size)
    codes, x_scale = quantize_fp8(x, 128)
    got = fp8_kernel(codes, weight, scale, x_scale)
    assert torch.equal(got, fp8_kernel(x, weight, scale))
    assert_rounded(block_fp8_linear.reference(codes, weight, scale, x_scale), want, size)


def test_a_split_product_is_split():
    assert product.tiling(5, 192, 1792).split
    assert product.tiling(5, 192, 1792).chunks > 2


def test_parts_are_tensors_of_their_own():
    x, (weight, scale) = make_x(3, 256), make_weight(448, 256)
    whole = fp8_kernel(x, weight, scale)
    parts = fp8_kernel(x, weight, scale, None, (256, 128, 64))
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(torch.cat(parts, -1), whole)
    two = fp8_kernel(x, weight, scale, None, (256, 192))
    assert torch.equal(torch.cat(two, -1), whole)


def test_a_weight_of_fnuz_reads_the_same(monkeypatch):
    """gfx942 reads the same bytes as half of each value; -0 is not its NaN."""
    x, (weight, scale) = make_x(2, 256), make_weight(128, 256)
    weight.view(torch.uint8)[0, :8] = 0x80
    x[0, 7] = -0.0
    want = fp8_kernel(x, weight, scale)
    monkeypatch.setattr(product, "is_fnuz", lambda: True)
    assert torch.equal(fp8_kernel(x, weight, scale), want)
    assert torch.equal(fp8_kernel(*_coded(x, weight, scale)), want)


def _coded(x, weight, scale):
    codes, x_scale = quantize_fp8(x, 128)
    return codes, weight, scale, x_scale


@pytest.mark.parametrize("tokens, rows, inputs", [(1, 64, 128), (4, 200, 1600), (33, 129, 192)])
def test_bf16_with_an_fp32_result(tokens, rows, inputs):
    x, weight = make_x(tokens, inputs), make_x(rows, inputs)
    got, want = fp32_kernel(x, weight), x.double() @ weight.double().T
    assert got.dtype == torch.float32
    # fp32 sums of up to 1600 products near 1
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)
    torch.testing.assert_close(linear_fp32.reference(x, weight), got, rtol=0, atol=1e-4)
    parts = fp32_kernel(x, weight, (16, rows - 16))
    assert torch.equal(torch.cat(parts, -1), got)


@pytest.mark.parametrize("tokens, groups, rank, inputs", [(3, 2, 128, 1024), (66, 2, 128, 512)])
@pytest.mark.parametrize("packed", [True, False])
def test_grouped(tokens, groups, rank, inputs, packed):
    o = make_x(tokens, groups * inputs).view(tokens, -1, 512)
    weight, scale = make_weight(groups * rank, inputs)
    if not packed:
        weight, scale = dequantize_weight(weight, scale, torch.bfloat16), None
    got = grouped_kernel(o, weight, scale, groups)
    for group in range(groups):
        x = o.flatten(1)[:, group * inputs : (group + 1) * inputs]
        mine = slice(group * rank, (group + 1) * rank)
        if packed:
            want = exact(x, weight[mine], scale[group : group + 1])
            dense = dequantize_weight(weight[mine], scale[group : group + 1])
        else:
            want, dense = x.double() @ weight[mine].double().T, weight[mine]
        assert_rounded(got[:, mine], want, x.abs().double() @ dense.abs().double().T)
    codes, z_scale = grouped_kernel(o, weight, scale, groups, True)
    want_codes, want_scale = quantize_fp8(got, 128)
    assert torch.equal(z_scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))


def test_a_row_has_the_same_bits_in_any_batch(sums_in_order):
    """Split or not, quantised inside or before, in tiles of 16, 64 or 128 tokens."""
    inputs, tokens = 1024, 260
    x, (weight, scale) = make_x(tokens, inputs), make_weight(128, inputs)
    dense = make_x(64, inputs)
    assert product.tiling(1, 128, inputs).split
    whole, fp32 = fp8_kernel(x, weight, scale), fp32_kernel(x, dense)
    for part in (slice(0, 1), slice(100, 120), slice(200, 260)):
        assert torch.equal(fp8_kernel(x[part], weight, scale), whole[part])
        assert torch.equal(fp32_kernel(x[part], dense), fp32[part])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_extreme_inputs(scale):
    x, (weight, w_scale) = make_x(2, 256, scale), make_weight(64, 256)
    want = exact(x, weight, w_scale)
    size = x.abs().double() @ dequantize_weight(weight, w_scale).abs().double().T
    assert_rounded(fp8_kernel(x, weight, w_scale), want, size)


def test_no_rows():
    weight, scale = make_weight(128, 256)
    x = torch.empty(0, 256, dtype=torch.bfloat16)
    assert fp8_kernel(x, weight, scale).shape == (0, 128)
    assert [y.shape for y in fp8_kernel(x, weight, scale, None, (64, 64))] == [(0, 64)] * 2
    assert fp32_kernel(x, torch.empty(48, 256, dtype=torch.bfloat16)).shape == (0, 48)
    o = torch.empty(0, 1, 512, dtype=torch.bfloat16)
    codes, z_scale = grouped_kernel(o, *make_weight(128, 512), 1, True)
    assert codes.shape == (0, 128) and z_scale.shape == (0, 1)


def test_counters_are_left_as_found(monkeypatch):
    counters = torch.zeros(product._LEAST_PROGRAMS, dtype=torch.int32)
    monkeypatch.setattr(product, "_arrived", lambda where: counters)
    x, (weight, scale) = make_x(5, 1792), make_weight(192, 1792)
    first = fp8_kernel(x, weight, scale)
    assert not counters.any()
    assert torch.equal(fp8_kernel(x, weight, scale), first)
