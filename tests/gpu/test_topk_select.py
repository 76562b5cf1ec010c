"""topk_select on a GPU: exact at released sizes, and the same from a captured graph."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.ops import topk_select

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_logits(tokens: int, entries: int, kind: str) -> torch.Tensor:
    logits = torch.randn(tokens, entries, device=DEVICE)
    return {"normal": logits, "ties": (logits * 4).round(), "equal": torch.zeros_like(logits)}[kind]


@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
@pytest.mark.parametrize(
    "tokens, entries, topk",
    [
        (0, 2048, 512),
        (1, 2048, 1024),
        (64, 8192, 1024),
        (3, 16384, 1024),
        (3, 16385, 512),
        (33, 32768, 1024),
        (4, 262144, 1024),
        (2, 262144, 512),
        (8192, 2048, 512),
    ],
)
def test_matches_reference(tokens, entries, topk, kind):
    logits = make_logits(tokens, entries, kind)
    visible = torch.randint(0, entries + 1, (tokens,), device=DEVICE)
    visible[:1] = entries
    got = topk_select.implementations["triton"].load()(logits, visible, topk)
    assert torch.equal(got, topk_select.reference(logits, visible, topk))


def test_graph_replay_equals_eager():
    kernel = topk_select.implementations["triton"].load()
    logits, visible = make_logits(16, 40000, "normal"), torch.full((16,), 40000, device=DEVICE)
    kernel(logits, visible, 512)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(logits, visible, 512)
    for length in (40000, 9000, 300, 0):
        logits.copy_(make_logits(16, 40000, "ties"))
        visible.fill_(length)
        graph.replay()
        assert torch.equal(out, topk_select.reference(logits, visible, 512))
