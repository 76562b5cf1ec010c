"""sparse_mla against its reference: interpreted on the CPU, or on the GPU that is there."""

from __future__ import annotations

import pytest
import torch
from devices import INTERPRETED, interpreted_only, kernel
from gluon_on_torch import launcher

from dsv4_plugin.cache.layout import latent_page_bytes
from dsv4_plugin.cache.stores import PackedLatentCache
from dsv4_plugin.kernels.gluon import sparse_mla as gluon
from dsv4_plugin.kernels.triton import sparse_mla as triton
from dsv4_plugin.ops.rope import rotation
from dsv4_plugin.ops.sparse_mla import sparse_mla

SCALE = 512**-0.5
FREQUENCIES = 160000 ** -(torch.arange(0, 64, 2) / 64)
# Expected is the reference of the same queries in fp32, attention and then the rotation with no
# rounding; a kernel rounds to bf16 once, after both, by up to 2^-8 of the result. Interpreted, the
# Triton kernel multiplies in fp32 as the reference does: they differ by the order of sums. The
# Gluon kernel also rounds probabilities to bf16, each by up to 2^-8 of itself and half of that on
# average; an output is a mean of latents of size ~1 under them, and where those cancel the errors
# do not: 2^-9 of the largest latent, ~4. The rotation mixes two such errors, √2 of one at most.
TOLERANCE = {"triton": dict(rtol=2**-8, atol=1e-5), "gluon": dict(rtol=2**-8, atol=2**-6.5)}


def latents(
    pages: int, slots_per_page: int, generator: torch.Generator, scale: float = 1.0
) -> PackedLatentCache:
    """A cache of random latents over poisoned bytes: page 0 and what no slot covers stay 0xFF,
    e4m3's NaN."""
    raw = torch.full((pages, latent_page_bytes(slots_per_page)), 0xFF, dtype=torch.uint8)
    cache = PackedLatentCache(raw, slots_per_page)
    slots = torch.arange(slots_per_page, pages * slots_per_page)
    cache.store(slots, torch.randn(len(slots), 512, generator=generator) * scale)
    return cache


def slot_list(
    tokens: int,
    width: int,
    lengths: list[int],
    cache: PackedLatentCache,
    generator: torch.Generator,
    last: bool = False,
) -> torch.Tensor:
    """int64 [tokens, width]: random slots of pages > 0, `lengths[t]` of them, absent ones last (or
    first)."""
    first, most = cache.slots_per_page, cache.pages.shape[0] * cache.slots_per_page
    slots = torch.randint(first, most, (tokens, width), generator=generator)
    place = torch.arange(width)
    for row, length in enumerate(lengths):
        slots[row, place < width - length if last else place >= length] = -1
    return slots


def case(
    heads: int,
    window: list[int],
    compressed: list[int] | None,
    width: int = 0,
    ratio: int = 4,
    seed: int = 0,
    q_scale: float = 1.0,
) -> tuple:
    """Arguments of the operator: row t attends to `window[t]` and `compressed[t]` slots, at a
    position of its own below 2^20."""
    generator = torch.Generator().manual_seed(seed)
    tokens = len(window)
    window_cache = latents(3, 256, generator)
    q = (torch.randn(tokens, heads, 512, generator=generator) * q_scale).to(torch.bfloat16)
    sink = torch.randn(heads, generator=generator)
    slots = slot_list(tokens, 128, window, window_cache, generator, last=True)
    cos, sin = rotation(torch.randint(1 << 20, (tokens,), generator=generator), FREQUENCIES)
    if compressed is None:
        return q, window_cache, slots, None, None, sink, SCALE, cos, sin
    cache = latents(5 if ratio == 4 else 40, 256 // ratio, generator)
    return (
        q,
        window_cache,
        slots,
        cache,
        slot_list(tokens, width, compressed, cache, generator),
        sink,
        SCALE,
        cos,
        sin,
    )


def finite_reference(arguments: tuple) -> torch.Tensor:
    """The reference in fp32 on caches whose poison is cleared: it multiplies absent latents by
    zero."""
    q, window_cache, window, cache, slots, *rest = arguments
    clean = [
        each and PackedLatentCache(each.pages.clone(), each.slots_per_page)
        for each in (window_cache, cache)
    ]
    for each in clean:
        if each:
            each.pages[0] = 0
    return sparse_mla.reference(q.float(), clean[0], window, clean[1], slots, *rest)


@pytest.fixture(params=[1, 4], ids=["one pass", "4 splits"])
def splits(request, monkeypatch) -> int:
    """Each test runs in a single pass and with a token's tiles split over programs, by tiles as
    GPUs have them."""
    if INTERPRETED:
        monkeypatch.setattr(triton, "_TILE_TABLE", [("cpu", 128, triton.Tile(16, 32, 1, 1))])
    monkeypatch.setattr(triton, "split_count", lambda *shape: request.param)
    return request.param


def implementation(name: str, monkeypatch: pytest.MonkeyPatch):
    """The operator by one kernel."""
    if not INTERPRETED:
        return kernel(sparse_mla, name)
    monkeypatch.setattr(gluon, "_attend", launcher(gluon._attend))
    return {"triton": triton, "gluon": gluon}[name].sparse_mla


@pytest.fixture(params=["triton", "gluon"])
def check(request, splits, monkeypatch):
    """Compares an implementation with the reference."""
    run = implementation(request.param, monkeypatch)
    kind = request.param if INTERPRETED else "gluon"  # where bf16 is multiplied as such

    def compare(arguments: tuple, **tolerance: float) -> None:
        expected = finite_reference(arguments)
        assert torch.isfinite(expected).all()
        got = run(*arguments)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected, **(tolerance or TOLERANCE[kind]))

    return compare


@pytest.mark.parametrize("heads", [8, 16, 24, 80])
def test_heads(heads, check):
    check(case(heads, [128, 77], [96, 70], 96))


def test_lengths(check):
    """Rows with nothing compressed, one entry, a full tile, one more, and an empty window."""
    check(case(16, [1, 33, 128, 128, 0, 0], [0, 1, 32, 33, 5, 0], 64))


def test_window_only(check):
    check(case(16, [3, 128], None))


def test_two_slots_a_page(check):
    check(case(16, [128, 40], [64, 9], 64, ratio=128))


def test_list_wider_than_any_row(check):
    """A list sized for the longest context, as in a captured graph: splits past a row's end write
    nothing."""
    check(case(16, [128, 5], [40, 0], 1024, ratio=128))


@pytest.mark.parametrize("q_scale", [0.0, 30.0, 2000.0])
def test_extreme_logits(q_scale, check):
    """Logits of 0 and about ±1e2 and ±1e4, whose exponentials overflow without the running
    maximum."""
    arguments = case(16, [128, 20], [40, 40], 64, q_scale=q_scale)
    # A logit of 1e4 has an fp32 spacing of 1e-3, so exp carries a relative error of a few 1e-3.
    check(arguments, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sink", [-1e4, 0.0, 1e4])
def test_sink(sink, check):
    """A sink that takes nothing, some, or everything."""
    arguments = list(case(16, [128, 0], [40, 0], 64))
    arguments[5] = torch.full((16,), sink)
    check(tuple(arguments))


@pytest.mark.parametrize("name", ["triton", "gluon"])
def test_pairs_turn_back_by_their_position_and_are_rounded_once(name, splits, monkeypatch):
    """Rows that attend to two latents alike give their mean exactly; then complex numbers times
    e^(-i·t·f) in double."""
    q, cache, window, _, _, _, scale, cos, sin = case(16, [2] * 6, None)
    sink, turn = torch.full((16,), -1e4), torch.complex(cos.double(), -sin.double())
    got = implementation(name, monkeypatch)(
        torch.zeros_like(q), cache, window, None, None, sink, scale, cos, sin
    )
    mean = cache.load(window[:, -2:].flatten()).double().unflatten(0, (-1, 2)).mean(1)
    turned = torch.view_as_complex(mean[:, 448:].unflatten(-1, (-1, 2)).contiguous()) * turn
    want = (
        torch.cat((mean[:, :448], torch.view_as_real(turned).flatten(-2)), -1)
        .unsqueeze(1)
        .expand(-1, 16, -1)
    )
    # One rounding to bf16; fp32 products are off by some 2^-24 of a pair of size up to 4.
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2e-6)


@interpreted_only
@pytest.mark.parametrize("run", [triton.sparse_mla, gluon.sparse_mla], ids=["triton", "gluon"])
def test_no_rows(run):
    q, *rest = case(16, [128], [8], 32)
    empty = (
        q[:0],
        rest[0],
        rest[1][:0],
        rest[2],
        rest[3][:0],
        *rest[4:6],
        *(part[:0] for part in rest[6:]),
    )
    assert run(*empty).shape == (0, 16, 512)


def test_small_scales(check):
    """Latents near zero, whose block scale is the smallest the quantiser gives."""
    arguments = case(16, [100], [30], 32)
    arguments[1].store(torch.arange(256, 768), torch.full((512, 512), 1e-6))
    check(arguments)


@pytest.mark.parametrize(
    ("tokens", "heads", "blocks", "tiles", "programs", "splits"),
    [
        # no more than tiles
        (1, 16, 1, 18, 512, 16),
        (1, 16, 1, 3, 512, 2),
        (1, 16, 1, 1, 512, 1),
        (0, 16, 1, 4, 512, 4),
        (1, 16, 1, 130, 512, 32),  # nor than 32
        # nor than fit, rounded down
        (1, 16, 1, 18, 12, 8),
        (4, 128, 2, 36, 16, 2),
        (4096, 128, 2, 36, 512, 1),
        # nor than pay for their parts
        (4, 128, 2, 36, 512, 8),
        (64, 16, 1, 18, 512, 4),
        (512, 16, 1, 18, 4096, 1),
    ],
)
def test_split_count(tokens, heads, blocks, tiles, programs, splits):
    assert triton.split_count(tokens, heads, blocks, tiles, programs) == splits
