"""RoPE against complex numbers (docs/model.md §1 YaRN, §3.2)."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch

from dsv4_plugin.config import Geometry
from dsv4_plugin.ops.rope import apply_rope, inverse_frequencies, rotation

POSITIONS = (0, 1, 127, 128, 4095, 65536, 1048575)


def yarn_frequencies(config: dict) -> list[float]:
    """docs/model.md §1, one pair at a time."""
    theta, scaling = config["compress_rope_theta"], config["rope_scaling"]
    original = scaling["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        return 64 * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = math.floor(pair(scaling["beta_fast"])), math.ceil(pair(scaling["beta_slow"]))
    assert (low, high) == (15, 25)  # the figures that docs/model.md gives
    result = []
    for i in range(32):
        f, share = theta ** (-2 * i / 64), min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(f * (1 - share) + f / scaling["factor"] * share)
    return result


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_frequencies_of_released_models(released_config, ratio):
    got = inverse_frequencies(Geometry.from_config(released_config), ratio)
    want = (
        yarn_frequencies(released_config)
        if ratio
        else [released_config["rope_theta"] ** (-2 * i / 64) for i in range(32)]
    )
    # A power and two products in fp32, each within a few units of 2^-24.
    np.testing.assert_allclose(got.double().numpy(), want, rtol=5e-7)


def test_rotation_is_the_unit_circle_at_fp32_angles(released_config):
    frequencies = inverse_frequencies(Geometry.from_config(released_config), 4)
    cos, sin = rotation(torch.tensor(POSITIONS), frequencies)
    for row, position in enumerate(POSITIONS):
        for i, frequency in enumerate(frequencies.numpy()):
            # the angle itself is rounded to fp32, as everywhere else
            angle = float(np.float32(position) * frequency)
            want = cmath.exp(1j * angle)
            # one rounding of each part, 2^-24 of 1
            assert abs(complex(cos[row, i], sin[row, i]) - want) < 2e-7


@pytest.mark.parametrize("shape", [(5, 512), (5, 3, 512), (5, 2, 128), (0, 3, 512)])
@pytest.mark.parametrize("inverse", [False, True])
def test_pairs_are_complex_numbers(shape, inverse):
    x = torch.randn(shape)
    angle = torch.rand(shape[0], 32) * 7
    got = apply_rope(x, angle.cos(), angle.sin(), inverse)
    pairs = torch.view_as_complex(x[..., -64:].double().unflatten(-1, (32, 2)).contiguous())
    turn = torch.polar(
        torch.ones(shape[0], 32, dtype=torch.float64), angle.double() * (-1 if inverse else 1)
    )
    want = pairs * turn.view(shape[0], *[1] * (len(shape) - 2), 32)
    assert torch.equal(got[..., :-64], x[..., :-64])
    # Two fp32 products and a sum of values below 5.
    torch.testing.assert_close(
        got[..., -64:].double(), torch.view_as_real(want).flatten(-2), rtol=0, atol=2e-6
    )


def test_bf16_is_rounded_once():
    x = torch.randn(7, 4, 512).bfloat16()
    angle = torch.rand(7, 32) * 7
    cos, sin = angle.cos(), angle.sin()
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).bfloat16())
