"""rope_hadamard_quant in Triton against its reference."""

from __future__ import annotations

import pytest
import torch
from devices import either, kernel

from dsv4_plugin.ops import rope_hadamard_quant
from dsv4_plugin.ops.rope import rotation


def make_inputs(tokens: int, heads: int, scale: float = 1.0) -> tuple:
    random = torch.Generator().manual_seed(tokens)
    q = (torch.randn(tokens, heads, 128, generator=random) * scale).bfloat16()
    weights = torch.randn(tokens, heads, generator=random)
    positions = torch.randint(0, 1 << 20, (tokens,), generator=random)
    return q, weights, *rotation(positions, 160000 ** -(torch.arange(0, 64, 2) / 64)), "fp8"


def run_both(inputs: tuple):
    run = kernel(rope_hadamard_quant)
    return run(*inputs), rope_hadamard_quant.reference(*inputs)


@pytest.mark.parametrize("tokens, heads", [(1, 64), (3, 16), (7, 11)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_matches_reference(tokens, heads, scale):
    (q, weights), (want_q, want_weights) = run_both(make_inputs(tokens, heads, scale))
    assert q.dtype == torch.float8_e4m3fn
    # Scales are powers of two of an amax that differs by rounding only, so the weights' factor is
    # the same bits; on a GPU a fused multiply-add may move a bf16 input, and with it an amax across
    # a power of two, for a head in a thousand.
    same = weights == want_weights
    assert same.float().mean() >= either(1.0, 0.98)
    # Sums of 128 terms in another order move a value by some 1e-7 of it: those that close to the
    # border of two FP8 numbers land on the neighbour, one code away.
    codes, want = q.view(torch.uint8).int(), want_q.view(torch.uint8).int()
    assert ((codes - want).abs() <= either(1, 2))[same].all()
    assert (codes != want)[same].float().mean() < either(2e-3, 2e-2)


def test_zeros_stay_zeros():
    inputs = make_inputs(2, 16, 0.0)
    (q, weights), (_, want_weights) = run_both(inputs)
    assert (q.float() == 0).all()
    assert torch.equal(weights, want_weights)


def test_no_rows():
    (q, weights), _ = run_both(make_inputs(0, 64))
    assert q.shape == (0, 64, 128) and weights.shape == (0, 64)


def test_a_single_channel_spreads_with_sylvester_signs():
    """Without a turn (position 0), channel c becomes row c of the matrix: +-2^-3.5, signs by common
    bits."""
    q = torch.zeros(1, 16, 128, dtype=torch.bfloat16)
    channels = torch.arange(16) * 8 + 5
    q[0, torch.arange(16), channels] = 1.0
    cos, sin = torch.ones(1, 32), torch.zeros(1, 32)
    (out, _), _ = run_both((q, torch.ones(1, 16), cos, sin, "fp8"))
    for head, channel in enumerate(channels.tolist()):
        signs = torch.tensor([(-1.0) ** bin(channel & j).count("1") for j in range(128)])
        assert torch.equal(out[0, head].float().sign(), signs)
