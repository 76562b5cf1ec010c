"""rope_hadamard_quant on a GPU: released shapes and graph replay."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.ops import rope_hadamard_quant
from dsv4_plugin.ops.rope import rotation

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_inputs(tokens: int) -> tuple:
    positions = torch.randint(0, 1 << 20, (tokens,), device=DEVICE)
    frequencies = 160000 ** -(torch.arange(0, 64, 2, device=DEVICE) / 64)
    return (
        torch.randn(tokens, 64, 128, device=DEVICE).bfloat16(),
        torch.randn(tokens, 64, device=DEVICE),
        *rotation(positions, frequencies),
        "fp8",
    )


@pytest.mark.parametrize("tokens", [0, 1, 7, 512, 8192])
def test_matches_reference(tokens):
    inputs = make_inputs(tokens)
    q, weights = rope_hadamard_quant.implementations["triton"].load()(*inputs)
    want_q, want_weights = rope_hadamard_quant.reference(*inputs)
    if not tokens:
        assert q.shape == want_q.shape
        return
    # A fused multiply-add in the rotation may round a bf16 input to its neighbour; that moves the
    # amax across a power of two, and with it a scale, for a head in a thousand at most.
    same = weights == want_weights
    assert same.float().mean() > 0.999
    codes, want = q.view(torch.uint8).int()[same], want_q.view(torch.uint8).int()[same]
    assert (codes != want).float().mean() < 2e-2
    # a code away, and what a flipped bf16 spreads over all channels
    step = 2**-3 * want_q.float()[same].abs() + 2.0
    assert ((q.float()[same] - want_q.float()[same]).abs() <= step).all()


def test_graph_replay_equals_eager():
    kernel, inputs = rope_hadamard_quant.implementations["triton"].load(), make_inputs(64)
    kernel(*inputs)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(*inputs)
    for static, fresh in zip(inputs[:4], make_inputs(64)):
        static.copy_(fresh)
    graph.replay()
    q, weights = kernel(*inputs)
    assert torch.equal(out[0].view(torch.uint8), q.view(torch.uint8)) and torch.equal(
        out[1], weights
    )
