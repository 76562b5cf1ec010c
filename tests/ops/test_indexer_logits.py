"""Index scores, one row, head and entry at a time in float64 (docs/model.md §3.4)."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch

from dsv4_plugin.cache import DenseIndexCache, PackedIndexCache, index_page_bytes
from dsv4_plugin.ops import build_step_plan, indexer_logits

from .tables import Request, Tables

pytestmark = pytest.mark.usefixtures("each_form")
# `ops.indexer_logits` is the operator, which hides the module of the same name.
MODULE = import_module("dsv4_plugin.ops.indexer_logits")
REQUESTS = [Request(0, 9), Request(250, 20), Request(3, 1), Request(0, 2), Request(513, 6)]


class Case:
    def __init__(self, requests=REQUESTS, heads: int = 3):
        self.tables = Tables(requests)
        self.plan = build_step_plan.reference(**self.tables.arguments())
        rows = self.plan.position.shape[0]
        self.q, self.weights = torch.randn(rows, heads, 128), torch.randn(rows, heads)
        self.cache = DenseIndexCache(self.tables.pages * 64, rounded=False)
        self.cache.values.normal_()

    def expected(self, q) -> np.ndarray:
        out = np.full((q.shape[0], self.plan.max_seq_len // 4), -np.inf)
        for row, (request, position) in enumerate(self.tables.rows()):
            for entry in range((position + 1) // 4):
                slot = self.tables.full(request, 4 * entry) // 4
                key = self.cache.load(torch.tensor([slot]))[0].double()
                scores = (q[row].double() @ key).clamp_min(0)
                out[row, entry] = (self.weights[row].double() * scores).sum().item()
        return out


def assert_close(got, want):
    # fp32 sums of 128 products near 1 and of the heads.
    np.testing.assert_allclose(got.double().numpy(), want, atol=1e-4)


def test_ragged_batch():
    case = Case()
    assert_close(
        indexer_logits.reference(case.q, case.weights, case.cache, case.plan), case.expected(case.q)
    )


def test_blocks_of_queries_change_nothing(monkeypatch):
    case = Case()
    monkeypatch.setattr(MODULE, "_ROWS", 3)
    assert_close(
        indexer_logits.reference(case.q, case.weights, case.cache, case.plan), case.expected(case.q)
    )


def test_fp8_queries_and_packed_keys():
    case = Case()
    packed = PackedIndexCache(torch.zeros(case.tables.pages, index_page_bytes(), dtype=torch.uint8))
    packed.store(torch.arange(len(case.cache.values)), case.cache.values)
    case.cache, q = packed, case.q.to(torch.float8_e4m3fn)
    assert_close(
        indexer_logits.reference(q, case.weights, packed, case.plan), case.expected(q.float())
    )


def test_stale_entries_are_not_seen():
    case = Case()
    seen = {
        case.tables.full(r, 4 * w) // 4
        for r, request in enumerate(REQUESTS)
        for w in range(request.after // 4)
    }
    stale = [slot for slot in range(len(case.cache.values)) if slot not in seen]
    case.cache.values[stale] = float("nan")
    logits = indexer_logits.reference(case.q, case.weights, case.cache, case.plan)
    assert not logits.isnan().any()


@pytest.mark.parametrize("requests", [[], [Request(0, 3)], [Request(2, 0), Request(300, 0)]])
def test_no_rows_or_no_entries(requests):
    case = Case(requests)
    logits = indexer_logits.reference(case.q, case.weights, case.cache, case.plan)
    assert logits.shape == (case.plan.position.shape[0], case.plan.max_seq_len // 4)
