"""route on a GPU: released shapes, the reference on both devices, batches, graph replay."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.ops import route

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_inputs(tokens: int, experts: int = 384, hidden: int = 7168, hashed: bool = False) -> tuple:
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
    gate = (torch.randn(experts, hidden, device=DEVICE) * hidden**-0.5).bfloat16()
    table = torch.rand(1000, experts, device=DEVICE).argsort(-1)[:, :6].contiguous()
    bias = torch.randn(experts, device=DEVICE) * 0.3
    ids = torch.randint(0, 1000, (tokens,), device=DEVICE)
    return x, gate, None if hashed else bias, table if hashed else None, ids, 6, 2.5


def by_expert(result, experts: int) -> torch.Tensor:
    weights, chosen = result
    dense = weights.new_zeros(weights.shape[0], experts)
    return dense.scatter_add_(1, chosen.clamp_min(0), weights)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 7, 64, 1023, 1024, 8192])
@pytest.mark.parametrize("experts, hidden", [(384, 7168), (256, 4096)])
def test_matches_reference(tokens, experts, hidden, hashed):
    inputs = make_inputs(tokens, experts, hidden, hashed)
    got = by_expert(route.implementations["triton"].load()(*inputs), experts)
    want = by_expert(route.reference(*inputs), experts)
    # Sums of 7168 fp32 products in another order move a logit by some 1e-6; a choice turns over
    # where two keys are nearer than that.
    off = (got - want).abs().amax(-1) > 1e-4
    assert off.float().mean() < 1e-3 if tokens > 1000 else not off.any()


def test_reference_is_that_of_the_cpu():
    inputs = make_inputs(64)
    want = route.reference(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs))
    got = by_expert(route.reference(*inputs), 384).cpu()
    torch.testing.assert_close(got, by_expert(want, 384), rtol=1e-4, atol=1e-5)


def test_extreme_logits():
    x, gate, bias, *rest = make_inputs(1, 384, 7168)
    gate.fill_(0)
    x.fill_(0)[0, 0] = 1
    for level in (-87.0, -103.0, -150.0, -1e4, 1e4):
        gate[:, 0] = level
        weights, _ = route.implementations["triton"].load()(x, gate, bias, *rest)
        want, _ = route.reference(x.cpu(), gate.cpu(), bias.cpu(), None, rest[1].cpu(), *rest[2:])
        torch.testing.assert_close(weights.cpu(), want, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("size", [5, 700, 5000])
def test_a_row_has_the_same_bits_in_any_batch(size):
    x, gate, bias, _, ids, *rest = make_inputs(size)
    kernel = route.implementations["triton"].load()
    together = kernel(x, gate, bias, None, ids, *rest)
    for row in (0, size // 2, size - 1):
        alone = kernel(x[row : row + 1], gate, bias, None, ids[row : row + 1], *rest)
        assert all(torch.equal(part[row], other[0]) for part, other in zip(together, alone))


def test_graph_replay_equals_eager():
    kernel, inputs = route.implementations["triton"].load(), make_inputs(64)
    kernel(*inputs)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(*inputs)
    for static, fresh in zip(inputs[:3], make_inputs(64)):
        static.copy_(fresh)
    graph.replay()
    assert all(torch.equal(part, other) for part, other in zip(out, kernel(*inputs)))
