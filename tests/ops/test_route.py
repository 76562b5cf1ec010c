"""Routing against the formula in Python floats (docs/model.md §3.5)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_plugin.ops import route

SCALING = 2.5
TOPK = 6


def score(logit: float) -> float:
    """sqrt(softplus), with log1p so that it is exact for very negative logits."""
    return math.sqrt(math.log1p(math.exp(logit)) if logit < 30 else logit)


def inputs(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, gate) whose router logits are `logits` [T, E] to the last bit: x picks columns of the
    gate."""
    return torch.eye(logits.shape[0]), logits.T.contiguous()


def run(logits, bias=None, tid2eid=None, ids=None, topk=TOPK):
    ids = torch.zeros(len(logits), dtype=torch.int64) if ids is None else ids
    return route.reference(*inputs(logits), bias, tid2eid, ids, topk, SCALING)


def test_learned():
    logits, bias = torch.randn(50, 32) * 3, torch.randn(32)
    weights, experts = run(logits, bias)
    for row in range(50):
        scores = [score(x) for x in logits[row].tolist()]
        ranked = sorted(range(32), key=lambda e: -(scores[e] + bias[e].item()))[:TOPK]
        assert sorted(experts[row].tolist()) == sorted(ranked)
        total = sum(scores[e] for e in ranked)
        for weight, e in zip(weights[row].tolist(), experts[row].tolist()):
            # The bias chooses and does not weigh. Root, quotient and product in fp32.
            assert weight == pytest.approx(scores[e] / total * SCALING, rel=2e-6)


def test_hash():
    tid2eid = torch.rand(100, 32).argsort(-1)[:, :TOPK]
    ids = torch.randint(0, 100, (40,))
    logits = torch.randn(40, 32) * 3
    weights, experts = run(logits, tid2eid=tid2eid, ids=ids)
    assert torch.equal(experts, tid2eid[ids]) and experts.dtype == torch.int64
    for row in range(40):
        scores = [score(logits[row, e].item()) for e in experts[row].tolist()]
        assert weights[row].tolist() == pytest.approx(
            [s / sum(scores) * SCALING for s in scores], rel=2e-6
        )


def test_ties_go_to_the_lowest_expert():
    logits = torch.randint(0, 3, (60, 16)).float()
    _, experts = run(logits, torch.zeros(16))
    for row in range(60):
        ranked = sorted(range(16), key=lambda e: (-logits[row, e].item(), e))[:TOPK]
        assert experts[row].tolist() == ranked


# softplus computed as log(1 + e^x) is 0 in fp32 from -16.64 on, and the quotient 0/0; log1p lasts
# to e^-104.
@pytest.mark.parametrize("level", [-16.64, -17.0, -20.0, -87.0, -103.0, -104.5, -1e3, -1e4, -3e38])
@pytest.mark.parametrize("hashed", [False, True])
def test_all_chosen_logits_far_below_zero(level, hashed):
    logits = torch.full((3, 32), -3.4e38)
    chosen = torch.arange(TOPK).expand(3, -1)
    logits[:, :TOPK] = level
    table = {"tid2eid": torch.arange(TOPK).expand(1, -1)} if hashed else {"bias": torch.zeros(32)}
    weights, experts = run(logits, **table)
    assert torch.equal(experts, chosen)
    # Six equal scores share the factor, underflown ones too.
    torch.testing.assert_close(weights, torch.full((3, TOPK), SCALING / TOPK), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.floats(-200, 200, width=32), min_size=8, max_size=8))
def test_weights_sum_to_the_scaling_factor(values):
    weights, experts = run(torch.tensor([values]), torch.zeros(8))
    assert weights.isfinite().all() and (weights >= 0).all()
    # six fp32 quotients; denormal scores lose bits
    assert weights.sum().item() == pytest.approx(SCALING, rel=1e-5)
    assert len(set(experts[0].tolist())) == TOPK


def test_far_apart_logits_do_not_underflow():
    logits = torch.full((1, 8), -60.0)
    logits[0, 0] = 50.0
    weights, experts = run(logits, torch.zeros(8))
    assert experts[0, 0] == 0
    want = [score(50.0)] + [score(-60.0)] * 5
    assert weights[0].tolist() == pytest.approx([w / sum(want) * SCALING for w in want], rel=2e-6)


def test_bf16_inputs_are_scored_in_fp32():
    x, gate, bias = torch.randn(9, 128).bfloat16(), torch.randn(32, 128).bfloat16(), torch.randn(32)
    ids = torch.zeros(9, dtype=torch.int64)
    weights, experts = route.reference(x, gate, bias, None, ids, TOPK, SCALING)
    want = route.reference(x.float(), gate.float(), bias, None, ids, TOPK, SCALING)
    assert (
        weights.dtype == torch.float32
        and torch.equal(weights, want[0])
        and torch.equal(experts, want[1])
    )


def test_no_rows():
    for table in ({"bias": torch.zeros(32)}, {"tid2eid": torch.zeros(1, TOPK, dtype=torch.int64)}):
        weights, experts = run(torch.empty(0, 32), **table)
        assert weights.shape == experts.shape == (0, TOPK)
