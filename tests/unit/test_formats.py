"""Number formats against tables of the OCP specifications, ml_dtypes, scipy and brute force."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.linalg import hadamard as scipy_hadamard

from dsv4_plugin import formats

# OCP Microscaling Formats 1.0, table 5: e2m1 has one exponent bias, so 0.5 is its only subnormal.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3_values() -> np.ndarray:
    """All 256 values by OCP FP8: bias 7, S.1111.111 is NaN, no infinities."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            values.append(math.nan)
        else:
            fraction = mantissa / 8 if exponent == 0 else 1 + mantissa / 8
            values.append(sign * fraction * 2.0 ** (max(exponent, 1) - 7))
    return np.array(values, np.float32)


def nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Value of `table` (sorted, its even codes at even places) nearest to each magnitude in `x`,
    ties to the even code."""
    distance = np.abs(np.abs(x).astype(np.float64)[:, None] - table[None])
    closest = distance == distance.min(1, keepdims=True)
    even = np.arange(len(table)) % 2 == 0
    choice = np.where(closest.sum(1) == 1, closest.argmax(1), (closest & even).argmax(1))
    return np.copysign(table[choice], x)


def finite(shape, limit=1e6):
    return arrays.arrays(np.float32, shape, elements=st.floats(-limit, limit, width=32))


def test_ue8m0_decodes_every_byte():
    scales = formats.ue8m0_to_float(torch.arange(255, dtype=torch.uint8))
    assert scales.dtype == torch.float32
    assert scales.tolist() == [math.ldexp(1.0, byte - 127) for byte in range(255)]


def test_ue8m0_of_torch_dtype():
    scales = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert torch.equal(
        formats.ue8m0_to_float(scales), formats.ue8m0_to_float(scales.view(torch.uint8))
    )


def test_ue8m0_bytes_invert():
    # Byte 0 is a denormal that no scale of ours takes.
    codes = torch.arange(1, 255, dtype=torch.uint8)
    assert torch.equal(formats.ue8m0_bytes(formats.ue8m0_to_float(codes)), codes)


@given(finite((3, 128)))
def test_fp8_scale_is_the_least_power_of_two(x):
    _, scale = formats.quantize_fp8(torch.from_numpy(x), 64)
    for row, amax in zip(scale.flatten().tolist(), np.abs(x).reshape(-1, 64).max(1)):
        needed = np.float32(max(amax, np.float32(1e-4))) / np.float32(448)
        assert math.frexp(row)[0] == 0.5
        assert row >= needed > row / 2


@given(finite((2, 128), limit=1e4))
def test_fp8_values_are_the_nearest(x):
    values, scale = formats.quantize_fp8(torch.from_numpy(x), 128)
    table = e4m3_values()[:127]
    expected = nearest((x / scale.numpy()).ravel(), table)
    assert np.array_equal(values.float().numpy().ravel(), expected)


def test_fp8_cast_agrees_with_ml_dtypes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator) * torch.logspace(-6, 4, 64).unsqueeze(1)
    values, scale = formats.quantize_fp8(x, 128)
    scaled = (x.unflatten(-1, (-1, 128)) / scale.unsqueeze(-1)).flatten(-2).numpy()
    assert np.array_equal(
        values.view(torch.uint8).numpy(), scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


@given(finite((2, 128)))
def test_fp8_error_is_half_a_step(x):
    tensor = torch.from_numpy(x)
    values, scale = formats.quantize_fp8(tensor, 64)
    error = (formats.dequantize_fp8(values, scale) - tensor).abs()
    # 3 mantissa bits: half a step is 2^-4 of the value, and below 2^-6 the steps are 2^-9 of the
    # scale.
    bound = torch.maximum(tensor.abs() * 2**-4, (scale * 2**-10).repeat_interleave(64, -1))
    assert bool((error <= bound).all())


def test_fp8_of_zeros_is_zero():
    values, scale = formats.quantize_fp8(torch.zeros(1, 64), 64)
    assert torch.equal(values.float(), torch.zeros(1, 64))
    # The floor 1e-4 / 448 = 2.23e-7 lies between 2^-23 and 2^-22.
    assert scale.item() == 2.0**-22


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_keeps_dtype_and_is_idempotent(dtype):
    x = torch.randn(5, 448, generator=torch.Generator().manual_seed(1)).to(dtype)
    for rounded in (formats.round_to_fp8(x, 64), formats.round_to_fp4(x)):
        assert rounded.dtype == dtype
    once = formats.round_to_fp8(x, 64)
    # A second pass may halve the scale at most, and every value is exact at either scale.
    assert torch.equal(formats.round_to_fp8(once, 64), once)


def test_block_that_does_not_divide():
    with pytest.raises(ValueError, match="100 is not a multiple of the block 64"):
        formats.quantize_fp8(torch.zeros(2, 100), 64)


@given(arrays.arrays(np.float32, 64, elements=st.floats(-8, 8, width=32)))
def test_e2m1_is_the_nearest(x):
    assert np.array_equal(
        formats.round_to_e2m1(torch.from_numpy(x)).numpy(), nearest(np.clip(x, -6, 6), E2M1[:8])
    )


def test_e2m1_ties_and_saturation():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9, -0.25, -2.5])
    # Ties go to the value whose mantissa bit is 0: 0, 1, 1, 2, 2, 4, 4.
    assert formats.round_to_e2m1(x).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, 0, -2]


def test_e2m1_agrees_with_ml_dtypes():
    x = torch.linspace(-7, 7, 4001)
    other = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(formats.round_to_e2m1(x).numpy(), other)


@given(finite((2, 64)))
def test_fp4_scale_and_error(x):
    tensor = torch.from_numpy(x)
    values, scale = formats.quantize_fp4(tensor)
    assert set(values.abs().unique().tolist()) <= set(E2M1[:8].tolist())
    amax = tensor.unflatten(-1, (-1, 32)).abs().amax(-1).clamp_min(6 * 2.0**-126)
    needed = amax / 6
    assert bool(((scale >= needed) & (needed > scale / 2)).all())
    # Steps are 0.5 below 2, 1 below 4, then 2: half a step is at most 1.
    assert bool(
        (
            (formats.dequantize_fp8(values, scale) - tensor).abs()
            <= scale.repeat_interleave(32, -1)
        ).all()
    )


def test_fp4_bytes_hold_the_even_column_low():
    values = torch.from_numpy(E2M1).repeat(2).view(1, 32)
    packed = formats.pack_fp4(values)
    assert packed.dtype == torch.int8 and packed.shape == (1, 16)
    expected = [(2 * i) % 16 | ((2 * i + 1) % 16) << 4 for i in range(16)]
    assert packed.view(torch.uint8).flatten().tolist() == expected


def test_fp4_unpacks_every_byte():
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    unpacked = formats.unpack_fp4(packed)
    expected = [value for byte in range(256) for value in (E2M1[byte & 15], E2M1[byte >> 4])]
    assert unpacked.tolist() == expected
    assert torch.equal(formats.unpack_fp4(packed.view(torch.uint8)), unpacked)


@pytest.mark.parametrize("scale_kind", ["ue8m0", "fp32"])
@pytest.mark.parametrize("shape", [(256, 384), (200, 130), (1, 5)])
def test_block_weight_by_hand(shape, scale_kind):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    grid = (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    exponents = torch.randint(118, 136, grid, generator=generator)
    scale = (
        exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
        if scale_kind == "ue8m0"
        else torch.rand(grid, generator=generator)
    )
    factor = (
        np.exp2(exponents.numpy() - 127.0).astype(np.float32)
        if scale_kind == "ue8m0"
        else scale.numpy()
    )
    expected = weight.float().numpy().copy()
    for row in range(shape[0]):
        for column in range(shape[1]):
            expected[row, column] *= factor[row // 128, column // 128]
    decoded = formats.dequantize_weight(weight, scale)
    assert decoded.dtype == torch.float32
    assert np.array_equal(decoded.numpy(), expected)
    assert torch.equal(formats.dequantize_weight(weight, scale, torch.bfloat16), decoded.bfloat16())


def test_fp4_weight_by_hand():
    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(-128, 128, (6, 48), generator=generator).to(torch.int8)
    exponents = torch.randint(118, 136, (6, 3), generator=generator)
    decoded = formats.dequantize_weight(
        packed, exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    )
    codes = packed.numpy().view(np.uint8)
    for row in range(6):
        for column in range(96):
            code = int(codes[row, column // 2]) >> (4 * (column % 2)) & 15
            assert decoded[row, column].item() == E2M1[code] * 2.0 ** (
                exponents[row, column // 32].item() - 127
            )


def test_stacked_weights_decode_alike():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 130, 256, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 2, generator=generator)
    stacked = formats.dequantize_weight(weight, scale)
    assert torch.equal(
        stacked, torch.stack([formats.dequantize_weight(*pair) for pair in zip(weight, scale)])
    )


@pytest.mark.parametrize("shape", [(128, 128), (300, 200)])
def test_weight_quantisers_stay_near(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    values, scale = formats.quantize_weight_fp8(weight)
    assert scale.dtype == torch.float8_e8m0fnu and scale.shape == (
        math.ceil(shape[0] / 128),
        math.ceil(shape[1] / 128),
    )
    decoded = formats.dequantize_weight(values, scale)
    # Half a step of 3 mantissa bits; subnormals of a block whose largest value is near 4: scale
    # 2^-6, half step 2^-16.
    assert bool(
        (
            (decoded - weight).abs() <= torch.maximum(weight.abs() * 2**-4, torch.tensor(2.0**-16))
        ).all()
    )


def test_fp4_weight_quantiser_round_trips():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(6))
    packed, scale = formats.quantize_weight_fp4(weight)
    assert packed.shape == (16, 64) and scale.shape == (16, 4)
    decoded = formats.dequantize_weight(packed, scale)
    assert torch.equal(decoded, formats.round_to_fp4(weight))
    # Values that FP4 holds exactly come back as the same bytes' values.
    assert torch.equal(formats.dequantize_weight(*formats.quantize_weight_fp4(decoded)), decoded)


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_hadamard_is_sylvester(size):
    x = torch.randn(7, size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = x.numpy() @ scipy_hadamard(size).T / math.sqrt(size)
    # fp32 sums of 128 terms of size 1: 7 additions deep, so a few 2^-24 each.
    np.testing.assert_allclose(formats.hadamard(x).numpy(), expected, atol=2e-6)


def test_hadamard_learns_after_it_served():
    with torch.inference_mode():
        formats.hadamard(torch.ones(2, 2048))
    x = torch.randn(2, 2048, requires_grad=True)
    formats.hadamard(x)[:, 0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2048**-0.5))  # column 0 is all ones


def test_hadamard_keeps_dot_products():
    q, k = torch.randn(2, 50, 128, generator=torch.Generator().manual_seed(8))
    # Orthogonal: equal up to fp32 sums of 128 products.
    torch.testing.assert_close(
        formats.hadamard(q) @ formats.hadamard(k).T, q @ k.T, rtol=0, atol=2e-5
    )
