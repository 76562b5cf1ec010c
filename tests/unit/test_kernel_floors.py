"""The floors of benchmarks/floors.py against sums made by hand, and issued bytes against what the
kernels' loops would move."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import floors  # noqa: E402


def test_attention():
    # Two tokens of one request, four heads; each sees three slots, two of which both see: four
    # distinct.
    floor = floors.sparse_mla(tokens=2, heads=4, slots=6, distinct=4)
    # cos and sin of a token are 32 fp32 each.
    assert floor.bytes == 4 * (448 + 128 + 8) + 2 * (4 * (1024 + 1024) + 2 * 32 * 4)
    assert floor.operations == 6 * 4 * (512 * 2 + 512 * 2)
    assert floor.products == "bf16"


def test_attention_at_128_heads_is_262_kflop_for_584_bytes_a_slot():
    one, two = (floors.sparse_mla(1, 128, slots, slots) for slots in (1, 2))
    assert two.bytes - one.bytes == 584 and two.operations - one.operations == 262144


def test_logits():
    # Two rows of 64 heads see 3 and 5 of the 5 entries of their request.
    floor = floors.indexer_logits(tokens=2, heads=64, logits=8, entries=5)
    assert floor.bytes == 5 * (128 + 4) + 8 * 4 + 2 * 64 * (128 + 4)
    assert floor.operations == 8 * 64 * 128 * 2 and floor.products == "fp8"


def test_selection():
    assert (
        floors.topk_select(tokens=2, visible=3000 + 5000, topk=1024).bytes
        == 8000 * 4 + 2 * 1024 * 8
    )


@pytest.mark.parametrize(
    ("ratio", "dim", "want"),
    [
        # values and scores of 8 items, the slot (7 blocks of 64, 64 bf16, 7 scales), cos and sin,
        # ape of two halves
        (4, 512, 8 * 2 * 512 * 4 + 583 + 256 + 4 * 1024 * 4),
        (4, 128, 8 * 2 * 128 * 4 + 132 + 256 + 4 * 256 * 4),
        (128, 512, 128 * 2 * 512 * 4 + 583 + 256 + 128 * 512 * 4),
    ],
)
def test_one_compressed_window(ratio, dim, want):
    assert floors.compress(windows=1, kept=0, ratio=ratio, dim=dim).bytes == want


def test_a_step_that_completes_nothing_only_keeps_rows():
    # A ratio-4 row has a value and a score for each of two halves of 512 channels, a ratio-128 row
    # for one.
    assert floors.compress(0, 3, 4, 512).bytes == 3 * 2 * (2 * 2 * 512 * 4)
    assert floors.compress(0, 3, 128, 512).bytes == 3 * 2 * (2 * 512 * 4)


def test_preparation():
    assert floors.qk_norm_rope_store(3, 16).bytes == 3 * (2048 * 16 + 1024 + 583 + 256)
    assert floors.rope_hadamard_quant(3, 64).bytes == 3 * (392 * 64 + 256)
    assert floors.qk_norm_rope_store(3, 16).operations == 0


def test_dense():
    """Two rows of 256 channels: streams of 2048 bytes, a row of 512, codes of 256 and two
    scales."""
    fn, coefficients, codes = 24 * 4 * 256 * 4, 20 * 4, 256 + 2 * 4
    enter = 2048 + 512 + codes + coefficients
    assert floors.mhc(2, 256, 24, True, False).bytes == 2 * enter + fn
    leave = 2048 + 512 + coefficients + 2048
    assert floors.mhc(2, 256, 24, False, True).bytes == 2 * leave
    between = floors.mhc(2, 256, 24, True, True)
    assert between.bytes == 2 * (enter + leave - 2048) + fn  # the streams are read once
    assert between.operations == 2 * 2 * 24 * 1024
    assert floors.mhc(2, 256, 4, True, False).bytes == 2 * (2048 + 512) + 4 * 1024 * 4
    assert floors.rms_norm_quant(2, 256).bytes == 2 * (512 + 512 + codes)
    assert floors.sample_greedy(3, 1000).bytes == 3 * (4000 + 8)


def test_products():
    fp8 = floors.product(2, 384, 256)
    assert fp8.bytes == 384 * 256 + 3 * 2 + 2 * (256 + 8 + 384 * 2)
    assert (fp8.operations, fp8.products) == (2 * 2 * 384 * 256, "fp8")
    bf16 = floors.product(2, 384, 256, fp8=False, out=4)
    assert bf16.bytes == 384 * 256 * 2 + 2 * (512 + 384 * 4)
    assert bf16.products == "bf16"
    grouped = floors.product(2, 256, 512, groups=2, out=1)
    assert grouped.bytes == 256 * 512 + 2 * 4 + 2 * (1024 + 8 * 4 + 256 + 2 * 4)


def test_step_plan():
    # One row: 128 slots through two tables and written, and seven numbers; two pages; a window of 8
    # items and one of 128.
    got = floors.build_step_plan(1, 2, {4: 1, 128: 1}).bytes
    assert got == 128 * 20 + 7 * 8 + 2 * 12 + (3 + 16) * 8 + (3 + 256) * 8


def test_experts():
    # 3 rows, 10 pairs on 4 experts of 256 by 128: 4.25 bits a weight.
    floor = floors.moe(tokens=3, pairs=10, touched=4, hidden=256, inner=128)
    assert floor.bytes == 4 * 3 * (256 * 128 * 17 // 32) + 3 * 256 * (2 + 4)
    assert floor.operations == 10 * 3 * 2 * 256 * 128 and floor.products == "fp8"
    floor = floors.shared_expert(3, 256, 128)
    assert floor.bytes == 3 * 256 * 128 + 3 * 256 * 6 and floor.operations == 3 * 6 * 256 * 128
    floor = floors.route(tokens=3, experts=32, hidden=256, topk=6)
    assert floor.bytes == 2 * 32 * 256 + 3 * (2 * 256 + 6 * 12)
    assert floor.operations == 2 * 3 * 32 * 256 and floor.products == "bf16"


def test_issued_by_experts():
    # Two experts with 3 and 17 pairs, 16 rows a block: three blocks. 64 columns of 128 in stage 1.
    got = floors.moe_issued([3, 17], 10, 256, 128, rows=16, gate_up_columns=64, down_columns=128)
    matrix = 256 * 128 * 17 // 32
    assert got == (
        3 * 20 * 16 + 3 * 17 * 4
        + 10 * (512 + 256 + 2)
        + 3 * 2 * matrix + 20 * (2 * (256 + 8) + 256)
        + 3 * matrix + 20 * (2 * 256 + 512)
        + 20 * (512 + 8) + 10 * 1024
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 8, 32, 64])
def test_experts_of_a_decode_step_stay_below_their_target(tokens):
    """1.1 times the floor up to 64 tokens, uniform routing over Pro's 384 experts of 384 columns:
    the weights are read once."""
    import torch

    from dsv4_plugin.kernels.triton.experts import TILES

    chosen = torch.rand(tokens, 384).argsort(-1)[:, :6]
    counts = chosen.flatten().bincount(minlength=384).tolist()
    mean = tokens * 6 / 384
    tiles = next(t for arch, kind, most, t in TILES if arch == "gfx950" and mean <= most)
    issued = floors.moe_issued(
        counts, tokens, 7168, 384, tiles.rows, tiles.gate_up.columns, tiles.down.columns
    )
    touched = sum(count > 0 for count in counts)
    assert issued < 1.1 * floors.moe(tokens, tokens * 6, touched, 7168, 384).bytes


def test_what_bounds():
    floor = floors.Floor(bytes=1000, operations=4000)
    assert floor.seconds(copy=10.0, peak=100.0) == 100.0 and floor.bound(10.0, 100.0) == "memory"
    assert (
        floor.seconds(copy=1000.0, peak=100.0) == 40.0 and floor.bound(1000.0, 100.0) == "products"
    )


def selected(visible: int, topk: int, chunk: int) -> int:
    """Bytes that a selection moves, counted program by program as the kernel's grid has it."""
    moved, sizes, first = 0, [visible], True
    while True:
        length = sizes[0]
        chunks = [min(chunk, length - start) for start in range(0, length, chunk)]
        kept = [min(part, topk) for part in chunks]
        moved += 4 * sum(chunks) + (0 if first else 4 * sum(kept))
        if len(chunks) == 1:
            return moved + 8 * topk
        moved += sum(8 * part for part in kept)
        sizes, first = [sum(kept)], False


@pytest.mark.parametrize("visible", [1024, 8192, 16384, 16385, 17408, 32768, 100_003, 262_144])
@pytest.mark.parametrize("topk", [512, 1024])
@pytest.mark.parametrize("chunk", [8192, 16384])
def test_issued_by_selection(visible, topk, chunk):
    assert floors.topk_select_issued(visible, topk, chunk) == selected(visible, topk, chunk)


@pytest.mark.parametrize("topk", [512, 1024])
def test_selection_stays_below_its_target(topk):
    """1.5 times the floor for every row of up to 1 M tokens, of which every fourth is an entry."""
    from dsv4_plugin.kernels.triton.topk_select import _CHUNK

    worst = max(
        floors.topk_select_issued(visible, topk, _CHUNK)
        / floors.topk_select(1, visible, topk).bytes
        for visible in range(topk, (1 << 18) + 1, 64)
    )
    assert worst < 1.5


def test_issued_by_compression():
    # Ratio 128 in 16 stripes of 32 channels: row numbers 16 times, ape with every window, the
    # pooled entry handed over in fp32.
    window = 16 * (8 + 128 * 16) + 128 * 512 * 12 + (2 * 512 * 4 + 8) + (512 * 2 + 256 + 8 + 583)
    assert (
        floors.compress_issued(windows=2, kept=1, tokens=3, ratio=128, dim=512, stripe=32)
        == 2 * window + 3 * 8 + 2 * 4096
    )
    window = 8 + 8 * 16 + 8 * 512 * 12 + (512 * 2 + 256 + 8 + 583)
    assert (
        floors.compress_issued(windows=2, kept=1, tokens=3, ratio=4, dim=512, stripe=512)
        == 2 * window + 3 * 8 + 2 * 8192
    )


def test_issued_by_attention():
    # 128 heads in two blocks of 64: both read 10 slots with their numbers, and cos and sin; then in
    # 4 parts, combined by head.
    whole = 2 * 10 * (584 + 8) + 128 * (1024 + 1024)
    assert floors.sparse_mla_issued(3, 128, 10, 64, 1) == 3 * (whole + 2 * 256)
    assert floors.sparse_mla_issued(3, 128, 10, 64, 4) == 3 * (
        whole + 2 * 4 * 128 * (512 + 1) * 4 + 128 * 256
    )


def test_issued_is_never_below_the_floor():
    for ratio, dim, stripe in ((4, 512, 512), (4, 128, 128), (128, 512, 32)):
        for windows in (1, 64, 2048):
            assert (
                floors.compress_issued(windows, 7, 64, ratio, dim, stripe)
                >= floors.compress(windows, 7, ratio, dim).bytes
            )
    for heads, block, splits in ((16, 16, 1), (16, 16, 16), (128, 64, 1), (128, 64, 8)):
        assert (
            floors.sparse_mla_issued(4, heads, 1152, block, splits)
            >= floors.sparse_mla(4, heads, 4 * 1152, 4 * 1152).bytes
        )
