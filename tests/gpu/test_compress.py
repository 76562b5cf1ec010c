"""compress on a GPU: ragged batches of released sizes, graph replay of a decode step, rings over 2
GiB."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from batches import Tables

from dsv4_plugin.cache import (
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from dsv4_plugin.ops import build_step_plan, compress
from dsv4_plugin.ops.rope import rotation

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = pytest.mark.parametrize("ratio, dim", [(4, 512), (4, 128), (128, 512)])
BATCHES = {
    "no rows": ([], []),
    "prefill": ([0, 0, 0], [4096, 1000, 129]),
    "chunks": ([250, 1131, 7], [2000, 126, 1]),
    "decode": (list(range(2, 2000, 17)), [1] * len(range(2, 2000, 17))),
}


class Case:
    """Inputs of one call; rings hold data where the step may read and NaN elsewhere."""

    def __init__(
        self, ratio: int, dim: int, prefix_lens: list[int], counts: list[int], static_rows: bool
    ):
        tables = Tables(max(len(counts), 1), 4352)
        arguments = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
            for name, value in tables.arguments(prefix_lens, counts).items()
        }
        self.rows = build_step_plan.reference(**arguments, static_rows=static_rows).compression[
            ratio
        ]
        self.ratio, self.dim, self.pages = ratio, dim, tables.pages
        width = dim * self.rows.halves
        self.projected = torch.randn(sum(counts), 2 * width, device=DEVICE)
        owners = tables.pages * 8 if ratio == 4 else (len(counts) + 1) * 128
        self.ring = torch.full((owners, 2 * width), float("nan"), device=DEVICE)
        read = self.rows.ring_row[self.rows.ring_row >= 0]
        self.ring[read] = torch.randn(len(read), 2 * width, device=DEVICE)
        self.ape = torch.randn(ratio, width, device=DEVICE)
        self.weight = torch.randn(dim, device=DEVICE).bfloat16()

    def make_cache(self):
        if self.dim == 128:
            return PackedIndexCache(
                torch.full((self.pages, index_page_bytes()), 0xA5, dtype=torch.uint8, device=DEVICE)
            )
        slots = entries_per_page(self.ratio)
        return PackedLatentCache(
            torch.full(
                (self.pages, latent_page_bytes(slots)), 0xA5, dtype=torch.uint8, device=DEVICE
            ),
            slots,
        )

    def rotations(self):
        return rotation(self.rows.position, 160000 ** -(torch.arange(0, 64, 2, device=DEVICE) / 64))

    def run(self, implementation, ring: torch.Tensor, cache) -> None:
        implementation(
            self.projected,
            ring,
            self.rows,
            self.ape,
            self.weight,
            1e-6,
            *self.rotations(),
            cache,
            torch.bfloat16,
            self.dim == 128,
        )


@KINDS
@pytest.mark.parametrize("static_rows", [False, True])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_matches_reference(ratio, dim, batch, static_rows):
    case = Case(ratio, dim, *BATCHES[batch], static_rows)
    ring, want_ring, cache, want = (
        case.ring.clone(),
        case.ring.clone(),
        case.make_cache(),
        case.make_cache(),
    )
    case.run(compress.implementations["triton"].load(), ring, cache)
    case.run(compress.reference, want_ring, want)
    assert torch.equal(ring.view(torch.int32), want_ring.view(torch.int32))
    slots = case.rows.slots[case.rows.slots > 0]
    if len(slots):
        # Sums in another order and fused multiply-adds move a value by some 1e-6, so a few bf16 and
        # FP8 roundings fall to the neighbour (e4m3: 2^-3). The rotation spreads a flipped bf16 over
        # 128 channels: 2^-8 of the largest.
        got, expected = cache.load(slots), want.load(slots)
        assert (got != expected).float().mean() < 3e-2
        amax = expected.abs().amax(-1, keepdim=True)
        assert ((got - expected).abs() <= 2**-3 * expected.abs() + 2**-7 * amax).all()


@KINDS
def test_graph_replay_equals_eager(ratio, dim):
    """A captured decode step whose plan is refreshed in place to one that completes other
    windows."""
    kernel = compress.implementations["triton"].load()
    length = ratio * 6
    case = Case(ratio, dim, [length - 1, length - 2, length], [1] * 3, True)
    later = Case(ratio, dim, [length, length - 1, length - 1], [1] * 3, True)
    cache, ring = case.make_cache(), case.ring.clone()
    cos, sin = case.rotations()
    arguments = (
        case.projected,
        ring,
        case.rows,
        case.ape,
        case.weight,
        1e-6,
        cos,
        sin,
        cache,
        torch.bfloat16,
        dim == 128,
    )
    kernel(*arguments)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(*arguments)
    for field in dataclasses.fields(case.rows):
        if isinstance(static := getattr(case.rows, field.name), torch.Tensor):
            static.copy_(getattr(later.rows, field.name))
    for static, fresh in (
        (case.projected, later.projected),
        (ring, later.ring),
        (cos, later.rotations()[0]),
        (sin, later.rotations()[1]),
        (case.ape, later.ape),
        (case.weight, later.weight),
    ):
        static.copy_(fresh)
    cache.pages.fill_(0xA5)
    graph.replay()
    eager_ring, eager = later.ring.clone(), later.make_cache()
    later.run(kernel, eager_ring, eager)
    assert torch.equal(ring.view(torch.int32), eager_ring.view(torch.int32))
    assert torch.equal(cache.pages, eager.pages)


def test_ring_over_two_gigabytes():
    case = Case(4, 512, [6], [3], False)
    row = (1 << 32) // (2048 * 4) + 5
    ring = torch.zeros(row + 1, 2048, device=DEVICE)
    kept = case.rows.ring_write_row.clone()
    kept[-1] = row
    case.rows = dataclasses.replace(case.rows, ring_write_row=kept)
    case.run(compress.implementations["triton"].load(), ring, case.make_cache())
    assert torch.equal(ring[row], case.projected[-1])
