"""How many variants of each kernel a server meets: each is a compilation, and most would stall it
while it serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import variants

from dsv4_plugin import kernels

BOUNDS = {
    # three forms (FP8, bf16, grouped) by tiles of 32, 64 and 128 tokens, whose speed hangs on
    # both; the grouped form quantises few tokens itself
    "product.product_kernel": 9,
    # routed by four sizes of row blocks and tiles, shared by three: what fills the chip at 1 token
    # spends twice the instructions at 1024
    "expert_kernels.gate_up_kernel": 7,
    "expert_kernels.down_kernel": 7,
    # a row is searched in registers: powers of two from 2048 to 16384, since what a row does not
    # fill is counted through too; chunks; a top-k of an odd number stores narrowly
    "topk_select.topk_select_kernel": 6,
    # kinds of cache entries
    "compress.pool_kernel": 3,
    "compress.keep_kernel": 1,
    "route.choose_kernel": 1,
}
OTHERS = 2
"""Of a kernel not named above: few tokens and many, split or whole, one ratio or the other, with or
without the sub-layer before; pairs in slots of their own or in order."""


@pytest.fixture(scope="module")
def counts():
    return variants.variants()


def test_variants_of_a_kernel(counts):
    above = {name: n for name, n in counts.items() if n > BOUNDS.get(name, OTHERS)}
    assert not above, "a count that varies is specialised on, or a constant follows a length"


def test_every_file_of_kernels_says_what_makes_a_variant():
    """In its docstring, in a line that begins so."""
    sources = [path.read_text() for path in Path(kernels.__file__).parent.rglob("*.py")]
    launched = [source for source in sources if "program_id(" in source]
    assert len(launched) > 10
    assert not [source[:80] for source in launched if "\n\nVariants: " not in source]


def test_bounds_are_of_kernels_that_run(counts):
    assert set(BOUNDS) <= set(counts)


def test_variants_in_all(counts):
    assert counts.total() <= 57
