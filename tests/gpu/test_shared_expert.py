"""shared_expert on a GPU: released shapes, batches, graph replay."""

from __future__ import annotations

import pytest
import torch
from expert_weights import LIMIT, any_matrix

from dsv4_plugin.ops import shared_expert
from dsv4_plugin.runtime.compare import error, tolerance

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_inputs(tokens: int, hidden: int, inner: int, form: str = "fp8") -> tuple:
    shapes = (inner, hidden), (hidden, inner), (inner, hidden)
    parts = [part for shape in shapes for part in any_matrix(1, *shape, form, DEVICE)]
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
    return x, *(None if part is None else part[0] for part in parts), LIMIT


def run(inputs) -> torch.Tensor:
    return shared_expert.implementations["triton"].load()(*inputs)


@pytest.mark.parametrize("form", ["fp8", "bf16"])
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 64, 300, 8192])
@pytest.mark.parametrize("hidden, inner", [(7168, 384), (4096, 2048)])
def test_matches_reference(tokens, hidden, inner, form):
    inputs = make_inputs(tokens, hidden, inner, form)
    allowed = tolerance("shared_expert", torch.bfloat16).limit
    assert error(run(inputs), shared_expert.reference(*inputs)) <= allowed


@pytest.mark.parametrize("tokens", [5, 40, 5000])
def test_a_row_has_the_same_bits_in_any_batch(tokens):
    x, *rest = make_inputs(tokens, 7168, 384)
    together = run((x, *rest))
    for row in (0, tokens // 2, tokens - 1):
        assert torch.equal(run((x[row : row + 1], *rest))[0], together[row])


def test_graph_replay_equals_eager():
    inputs = make_inputs(64, 7168, 384)
    run(inputs)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(inputs)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    assert torch.equal(out, run(inputs))
