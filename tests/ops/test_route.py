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


def shares(scores: list[float]) -> list[float]:
    """Weights of the chosen `scores`: DeepSeek's kernels add 1e-20 to their sum."""
    return [each / (sum(scores) + 1e-20) * SCALING for each in scores]


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


# Bug of 24728: softplus computed as log(1 + e^x) is 0 in fp32 from -16.64 on, and the quotient 0/0.
@pytest.mark.parametrize(
    "level", [-16.64, -17.0, -19.9, -20.1, -87.0, -90.0, -103.0, -104.5, -150.0, -1e3, -1e4, -3e38]
)
@pytest.mark.parametrize("hashed", [False, True])
def test_all_chosen_logits_far_below_zero(level, hashed):
    logits = torch.full((3, 32), -3.4e38)
    chosen = torch.arange(TOPK).expand(3, -1)
    logits[:, :TOPK] = level
    table = {"tid2eid": torch.arange(TOPK).expand(1, -1)} if hashed else {"bias": torch.zeros(32)}
    weights, experts = run(logits, **table)
    assert torch.equal(experts, chosen)
    # The level as fp32 has it: its last bit is 4e-6 of e^(-87/2).
    want = shares([score(float(torch.tensor(level)))] * TOPK)
    torch.testing.assert_close(
        weights, torch.tensor(want).expand(3, -1), rtol=5e-6, atol=torch.finfo(torch.float32).tiny
    )


def test_weights_of_scores_that_underflow_are_zero():
    """As DeepSeek's own kernels have it: no expert gets anything, and nothing is 0/0."""
    weights, _ = run(torch.full((2, 8), -3e38), torch.zeros(8))
    assert torch.equal(weights, torch.zeros(2, TOPK))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.floats(-200, 200, width=32), min_size=8, max_size=8))
def test_weights_sum_to_the_scaling_factor(values):
    weights, experts = run(torch.tensor([values]), torch.zeros(8))
    assert weights.isfinite().all() and (weights >= 0).all()
    best = sorted((score(value) for value in values), reverse=True)[:TOPK]
    # six fp32 quotients; denormal scores lose bits
    assert weights.sum().item() == pytest.approx(sum(shares(best)), rel=1e-5, abs=1e-30)
    assert len(set(experts[0].tolist())) == TOPK


@pytest.mark.parametrize("hashed", [False, True])
def test_rows_that_pad_a_graph_are_nobodys(hashed):
    """Bug of 39804: a row that pads a batch must not be routed."""
    logits, ids = torch.randn(4, 16), torch.tensor([3, -1, 0, -1])
    table = {"tid2eid": torch.rand(5, 16).argsort(-1)[:, :TOPK]} if hashed else {}
    weights, experts = run(logits, None if hashed else torch.zeros(16), ids=ids, **table)
    want = run(logits, None if hashed else torch.zeros(16), ids=ids.clamp_min(0), **table)
    for row in (0, 2):
        assert torch.equal(weights[row], want[0][row])
        assert torch.equal(experts[row], want[1][row])
    assert (experts[[1, 3]] == -1).all() and (weights[[1, 3]] == 0).all()


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
