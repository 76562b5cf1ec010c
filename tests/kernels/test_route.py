"""route in Triton against its reference and the formula."""

from __future__ import annotations

import math

import pytest
import torch

from dsv4_plugin.kernels.triton import route as kernels
from dsv4_plugin.ops import route

SCALING = 2.5
# Sums of fp32 products in another order, then a root and a quotient.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def triton(*arguments):
    return route.implementations["triton"].load()(*arguments)


def make_inputs(tokens: int, experts: int, hidden: int, hashed: bool, topk: int = 6) -> tuple:
    x = torch.randn(tokens, hidden).bfloat16()
    gate = (torch.randn(experts, hidden) * hidden**-0.5).bfloat16()
    table = torch.rand(50, experts).argsort(-1)[:, :topk].contiguous() if hashed else None
    bias = None if hashed else torch.randn(experts) * 0.3
    return x, gate, bias, table, torch.randint(0, 50, (tokens,)), topk, SCALING


def from_logits(logits: torch.Tensor, bias: torch.Tensor | None = None) -> tuple:
    """Inputs whose router logits are `logits` [T, E], as bf16 has them: x picks columns."""
    tokens, experts = logits.shape
    x, gate = torch.zeros(tokens, 128), torch.zeros(experts, 128)
    x[:, :tokens], gate[:, :tokens] = torch.eye(tokens), logits.T
    bias = torch.zeros(experts) if bias is None else bias
    ids = torch.zeros(tokens, dtype=torch.int64)
    return x.bfloat16(), gate.bfloat16(), bias, None, ids, 6, SCALING


@pytest.fixture(params=[1, 8])
def parts(request, monkeypatch):
    """Both ways of adding up the segments of the hidden size."""
    tile = kernels.Tile(16 if request.param == 8 else 64, 128, request.param, 1, 1)
    monkeypatch.setattr(kernels, "tile_of", lambda rows: tile)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(
    "tokens, experts, hidden", [(1, 384, 1280), (7, 256, 128), (70, 8, 384), (0, 8, 128)]
)
def test_matches_reference(tokens, experts, hidden, hashed, parts):
    inputs = make_inputs(tokens, experts, hidden, hashed)
    (weights, chosen), (want, want_chosen) = triton(*inputs), route.reference(*inputs)
    assert chosen.dtype == torch.int64 and torch.equal(chosen, want_chosen)
    torch.testing.assert_close(weights, want, **CLOSE)


def test_a_row_has_the_same_bits_in_any_batch(monkeypatch, sums_in_order):
    """Small integers make every sum exact whatever the order within a segment: what is left is how
    segments are added, in one program or in eight."""
    x, gate, bias, _, ids, *rest = make_inputs(70, 384, 1280, False)
    x, gate = (x * 8).round(), (gate * 256).round() / 64
    alone = tuple(
        torch.cat(part)
        for part in zip(*(triton(x[[row]], gate, bias, None, ids[[row]], *rest) for row in (3, 69)))
    )
    monkeypatch.setattr(kernels, "tile_of", lambda rows: kernels.Tile(16, 64, 8, 1, 1))
    together = triton(x, gate, bias, None, ids, *rest)
    assert all(torch.equal(part[[3, 69]], other) for part, other in zip(together, alone))


def test_ties_go_to_the_lowest_expert(parts):
    inputs = from_logits(torch.randint(0, 3, (60, 16)).float())
    (weights, chosen), (want, want_chosen) = triton(*inputs), route.reference(*inputs)
    assert torch.equal(chosen, want_chosen)
    torch.testing.assert_close(weights, want, **CLOSE)


@pytest.mark.parametrize(
    "level", [1e4, 88.0, 20.0, 1e-3, -1e-3, -16.625, -20.125, -87.0, -103.0, -150.0, -1e4, -3e38]
)
def test_extreme_logits(level):
    """Bug of 24728: far below 0 softplus must not become log(1 + 0). Six of eight experts have the
    same logit, so each has a sixth of what the sum's 1e-20 leaves."""
    logits = torch.full((2, 8), -3.3e38)
    logits[:, :6] = level
    inputs = from_logits(logits)
    level = float(inputs[1][0, 0])
    score = math.sqrt(math.log1p(math.exp(level)) if level < 30 else level)
    weights, chosen = triton(*inputs)
    assert torch.equal(chosen, torch.arange(6).expand(2, -1))
    want = torch.full((2, 6), score / (6 * score + 1e-20) * SCALING)
    torch.testing.assert_close(weights, want, rtol=5e-6, atol=1e-37)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(value, parts):
    x, *rest = make_inputs(5, 32, 256, False)
    spoiled = x.clone()
    spoiled[2, 7] = value
    (weights, chosen), (want, want_chosen) = triton(spoiled, *rest), triton(x, *rest)
    others = [0, 1, 3, 4]
    assert torch.equal(weights[others], want[others])
    assert torch.equal(chosen[others], want_chosen[others])
    assert ((chosen >= 0) & (chosen < 32)).all() and chosen[2].unique().numel() == 6


@pytest.mark.parametrize("hashed", [False, True])
def test_rows_that_pad_a_graph_are_nobodys(hashed):
    """Bug of 39804."""
    x, gate, bias, table, ids, *rest = make_inputs(5, 32, 128, hashed)
    ids[[1, 4]] = -1
    x[4] = float("nan")
    weights, chosen = triton(x, gate, bias, table, ids, *rest)
    assert (chosen[[1, 4]] == -1).all() and (weights[[1, 4]] == 0).all()
    want, want_chosen = route.reference(x, gate, bias, table, ids, *rest)
    assert torch.equal(chosen[:4], want_chosen[:4])
    torch.testing.assert_close(weights[:4], want[:4], **CLOSE)
