"""Shares of a process and the layouts that sizes do not allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_plugin.parallel import Group, Parallel, ParallelError


@given(size=st.integers(1, 16), share=st.integers(1, 40))
def test_shares_cover_everything_once(size, share):
    total = size * share
    rows = [row for rank in range(size) for row in range(total)[Group(rank, size).slice(total)]]
    assert rows == list(range(total))


def test_one_process_holds_everything(golden_geometry):
    parallel = Parallel()
    parallel.check(golden_geometry)
    assert parallel.vocab.slice(512) == slice(0, 512)
    assert parallel.attention.all_reduce("unchanged") == "unchanged"


# The golden model has 8 heads in 2 groups, 8 experts of 256, 512 tokens.
@pytest.mark.parametrize(
    "layout, named",
    [
        ({"attention": 3}, ["num_attention_heads", "8", "3"]),
        ({"attention": 4}, ["o_groups", "2", "4"]),
        ({"expert": 3}, ["n_routed_experts", "8", "3"]),
        ({"expert_tensor": 4}, ["moe_intermediate_size", "256", "4", "blocks of 128"]),
        ({"shared": 4}, ["moe_intermediate_size", "256", "4", "blocks of 128"]),
        ({"vocab": 3}, ["vocab_size", "512", "3"]),
    ],
)
def test_layout_that_does_not_divide(golden_geometry, layout, named):
    with pytest.raises(ParallelError) as raised:
        Parallel(**{group: Group(0, size) for group, size in layout.items()}).check(golden_geometry)
    assert all(word in str(raised.value) for word in named), raised.value


def test_layouts_that_divide(golden_geometry):
    two = Group(1, 2)
    Parallel(attention=two, expert=Group(3, 8), shared=two, vocab=Group(0, 4)).check(
        golden_geometry
    )
    Parallel(expert_tensor=two).check(golden_geometry)
