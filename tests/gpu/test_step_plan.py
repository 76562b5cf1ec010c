"""build_step_plan on a GPU: every number against the reference, and a captured graph refreshed step
after step."""

from __future__ import annotations

import pytest
import torch
from batches import PAGE, Tables

from dsv4_plugin.ops import build_step_plan

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BATCHES = {
    "no rows": ([], []),
    "prefill": ([0, 0, 0], [4096, 1000, 129]),
    "chunks": ([250, 1131, 7], [2000, 126, 1]),
    # more requests than one scan takes
    "decode": (list(range(0, 4000, 3)), [1] * len(range(0, 4000, 3))),
}


def on_device(arguments: dict) -> dict:
    return {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def assert_same(got, want) -> None:
    for name in ("position", "request", "query", "window_write", "window"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for request in range(want.page_table.shape[0]):  # what lies past a sequence's end is undefined
        rows = want.position[want.request == request]
        pages = int(rows.max()) // PAGE + 1 if len(rows) else 0
        assert torch.equal(got.page_table[request, :pages], want.page_table[request, :pages])
    for ratio, rows in want.compression.items():
        for name in ("token", "position", "slots", "step_row", "ring_row", "ring_write_row"):
            assert torch.equal(getattr(got.compression[ratio], name), getattr(rows, name)), (
                ratio,
                name,
            )


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_matches_reference(batch):
    prefix_lens, counts = BATCHES[batch]
    arguments = on_device(Tables(max(len(counts), 1), 4352).arguments(prefix_lens, counts))
    assert_same(
        build_step_plan.implementations["triton"].load()(**arguments),
        build_step_plan.reference(**arguments, static_rows=True),
    )


def test_graph_refreshes_the_plan_in_place():
    kernel, tables = build_step_plan.implementations["triton"].load(), Tables(8, 1024)
    static = on_device(tables.arguments([1000] * 8, [1] * 8))
    kernel(**static)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = kernel(**static)
    for step in range(120, 140):
        fresh = on_device(tables.arguments([step + i for i in range(8)], [1] * 8))
        for name, value in fresh.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
        graph.replay()
        assert_same(
            plan, build_step_plan.reference(**(fresh | {"max_seq_len": 1001}), static_rows=True)
        )
