"""indexer_logits on a GPU: contexts up to 128k, graph replay over growing contexts, a pool over 2
GiB."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import Tables

from dsv4_plugin.cache import PackedIndexCache, index_page_bytes
from dsv4_plugin.ops import build_step_plan, indexer_logits

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BATCHES = {
    "no rows": ([], []),
    "decode": ([131071, 5, 8191, 0, 1023, 65000], [1] * 6),
    "prefill": ([0, 0], [2048, 100]),
    "chunks": ([16000, 3, 509], [513, 1, 7]),
}


def make_case(prefix_lens: list[int], counts: list[int]):
    tables = Tables(
        max(len(counts), 1), max((p + c for p, c in zip(prefix_lens, counts)), default=1)
    )
    arguments = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in tables.arguments(prefix_lens, counts).items()
    }
    cache = PackedIndexCache(
        torch.zeros(tables.pages, index_page_bytes(), dtype=torch.uint8, device=DEVICE)
    )
    slots = torch.arange(tables.pages * 64, device=DEVICE)
    cache.store(slots, torch.randn(len(slots), 128, device=DEVICE))
    tokens = sum(counts)
    q = (torch.randn(tokens, 64, 128, device=DEVICE) * 50).to(torch.float8_e4m3fn)
    return (
        q,
        torch.randn(tokens, 64, device=DEVICE) * 2**-6,
        cache,
        build_step_plan.reference(**arguments),
    )


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    seen = want > float("-inf")
    if seen.any():
        # Hopper's FP8 products accumulate in 14 bits, 2^-13 of the largest partial sum; others
        # fp32, in another order.
        torch.testing.assert_close(
            got[seen], want[seen], rtol=0, atol=2**-11 * want[seen].abs().max().item()
        )


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_matches_reference(batch):
    case = make_case(*BATCHES[batch])
    assert_close(
        indexer_logits.implementations["triton"].load()(*case), indexer_logits.reference(*case)
    )


def test_graph_replay_equals_eager():
    """One captured launch, sized for 64k tokens, serves short and long contexts."""
    kernel = indexer_logits.implementations["triton"].load()
    q, weights, cache, plan = make_case([65535, 65535, 65535], [1] * 3)
    kernel(q, weights, cache, plan)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(q, weights, cache, plan)
    for lengths in ([65535, 3, 700], [0, 40000, 65535], [2, 2, 2]):
        plan.position.copy_(torch.tensor(lengths))
        q.copy_((torch.randn(3, 64, 128, device=DEVICE) * 50).to(torch.float8_e4m3fn))
        graph.replay()
        seen = torch.arange(out.shape[1], device=DEVICE) < plan.visible(4).unsqueeze(-1)
        assert torch.equal(out[seen], kernel(q, weights, cache, plan)[seen])
        assert_close(out, indexer_logits.reference(q, weights, cache, plan))


def test_pool_over_two_gigabytes():
    q, weights, cache, plan = make_case([511], [1])
    pages = (1 << 32) // index_page_bytes() + 9
    far = PackedIndexCache(torch.empty(pages, index_page_bytes(), dtype=torch.uint8, device=DEVICE))
    table = torch.tensor([[pages - 1, pages // 2 + 3]], device=DEVICE)
    far.pages[table[0]] = cache.pages[plan.page_table[0]]
    kernel = indexer_logits.implementations["triton"].load()
    assert torch.equal(
        kernel(q, weights, far, dataclasses.replace(plan, page_table=table)),
        kernel(q, weights, cache, plan),
    )
