"""How many variants of each kernel a server meets: each is a compilation, and most would stall it
while it serves."""

from __future__ import annotations

import pytest
import variants

BOUNDS = {
    # weights of a layer by tiles of 16, 32, 64 and 128 tokens, some with split sums
    "product.product_kernel": 32,
    # three page sizes by six split counts
    "sparse_mla._attend": 18,
    # split counts 2, 4 .. 32
    "sparse_mla.combine": 5,
    # blocks of 16, 64 and 128 rows; powers of two of pairs
    "grouping.group_kernel": 8,
    # routed or shared, FP4 or FP8, by row blocks
    "expert_kernels.gate_up_kernel": 8,
    "expert_kernels.down_kernel": 7,
    # powers of two from 1024 to 16384, candidates and slots, aligned or not
    "topk_select.topk_select_kernel": 13,
    # two ratios by powers of two of requests, aligned or not
    "step_plan.windows_kernel": 22,
    # pages of a request: one, a multiple of 16, or any number; wide stores follow from it
    "step_plan.pages_kernel": 3,
    # two widths of the search for a row; logits of a row aligned or not
    "indexer_logits.indexer_logits_kernel": 4,
    # kinds of cache entries
    "compress.pool_kernel": 3,
    "compress.keep_kernel": 3,
}
OTHERS = 2
"""Of a kernel not named above: few tokens and many, or with and without the sub-layer before."""


@pytest.fixture(scope="module")
def counts():
    return variants.variants()


def test_variants_of_a_kernel(counts):
    above = {name: n for name, n in counts.items() if n > BOUNDS.get(name, OTHERS)}
    assert not above, "a count that varies is specialised on, or a constant follows a length"


def test_bounds_are_of_kernels_that_run(counts):
    assert set(BOUNDS) <= set(counts)


def test_variants_in_all(counts):
    assert counts.total() <= 142
