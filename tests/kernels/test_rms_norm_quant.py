"""rms_norm_quant in Triton against its reference."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.formats import quantize_fp8
from dsv4_plugin.kernels.triton.rms_norm_quant import rms_norm_quant as kernel
from dsv4_plugin.ops import rms_norm_quant

EPS = 1e-6


def make_inputs(rows: int, columns: int, scale: float = 1.0) -> tuple:
    random = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, columns, generator=random) * scale).bfloat16()
    return x, torch.randn(columns, generator=random).bfloat16(), EPS


def assert_right(got: tuple, inputs: tuple) -> None:
    want = rms_norm_quant.reference(*inputs, "both")
    # Squares are summed in another order, 1e-7 of the mean: some values round to the neighbour.
    assert (got[0] != want[0]).float().mean() < 2e-3
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2**-7, atol=0)
    codes, scale = quantize_fp8(got[0], 128)
    assert torch.equal(got[1].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(got[2], scale)


@pytest.mark.parametrize("rows, columns", [(1, 128), (5, 1536), (3, 7168)])
def test_matches_reference(rows, columns):
    inputs = make_inputs(rows, columns)
    assert_right(kernel(*inputs, "both"), inputs)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-4, 1e17])
def test_extreme_magnitudes(scale):
    inputs = make_inputs(2, 256, scale)
    assert_right(kernel(*inputs, "both"), inputs)


def test_rows_of_a_wider_tensor():
    """The queries' part of a joint product, where it was not cut into tensors of its own."""
    x, weight, _ = make_inputs(3, 256)
    wide = torch.full((3, 640), float("nan"), dtype=torch.bfloat16)
    wide[:, 128:384] = x
    got, want = kernel(wide[:, 128:384], weight, EPS, "both"), kernel(x, weight, EPS, "both")
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want))


def test_keeps_what_is_asked_for():
    inputs = make_inputs(2, 256)
    both = kernel(*inputs, "both")
    normed, codes, scale = kernel(*inputs, "normed")
    assert torch.equal(normed, both[0]) and codes is None and scale is None
    normed, codes, scale = kernel(*inputs, "fp8")
    assert normed is None and torch.equal(scale, both[2])
    assert torch.equal(codes.float(), both[1].float())


def test_a_row_has_the_same_bits_in_any_batch():
    x, weight, _ = make_inputs(9, 384)
    whole = kernel(x, weight, EPS, "both")
    for a, b in zip(kernel(x[4:6], weight, EPS, "both"), whole):
        assert torch.equal(a.float(), b[4:6].float())


def test_no_rows():
    normed, codes, scale = kernel(*make_inputs(0, 256), "both")
    assert normed.shape == codes.shape == (0, 256) and scale.shape == (0, 2)
