"""sparse_mla on a GPU: released shapes, graph replay, poisoned memory, pools over 2 GiB."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.cache.layout import latent_page_bytes
from dsv4_plugin.cache.stores import PackedLatentCache
from dsv4_plugin.ops import sparse_mla
from dsv4_plugin.ops.rope import rotation

DEVICE = "cuda"
SCALE = 512**-0.5
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FREQUENCIES = 160000 ** -(torch.arange(0, 64, 2) / 64)
# Kernels round probabilities to bf16, each by up to 2^-8 of itself and half of that on average; an
# output is a mean of latents of size ~1 under them, and where those cancel the errors do not: 2^-9
# of the largest latent, ~4. The rotation mixes two such errors, √2 of one at most. The output is
# rounded once, after it, by up to 2^-8; what is expected is fp32.
TOLERANCE = dict(rtol=2**-8, atol=2**-6.5)


@pytest.fixture(params=["gluon", "triton"])
def kernel(request):
    """Each implementation that this GPU runs."""
    implementation = sparse_mla.implementations[request.param]
    if reason := implementation.unavailable():
        pytest.skip(reason)
    return implementation.load()


def filled(pages: int, slots_per_page: int, used: int) -> PackedLatentCache:
    """A cache with random latents in the last `used` pages; all other bytes are 0xFF, e4m3's and
    bf16's NaN."""
    raw = torch.full(
        (pages, latent_page_bytes(slots_per_page)), 0xFF, dtype=torch.uint8, device=DEVICE
    )
    cache = PackedLatentCache(raw, slots_per_page)
    slots = torch.arange((pages - used) * slots_per_page, pages * slots_per_page, device=DEVICE)
    for part in slots.split(1 << 16):
        cache.store(part, torch.randn(len(part), 512, device=DEVICE))
    return cache


def lists(
    tokens: int, width: int, lengths: torch.Tensor, cache: PackedLatentCache, used: int, last: bool
) -> torch.Tensor:
    """int64 [tokens, width]: random slots of the used pages, absent ones last, or first with
    `last`."""
    end = cache.pages.shape[0] * cache.slots_per_page
    slots = torch.randint(end - used * cache.slots_per_page, end, (tokens, width), device=DEVICE)
    place = torch.arange(width, device=DEVICE)
    absent = place < width - lengths[:, None] if last else place >= lengths[:, None]
    return slots.masked_fill(absent, -1)


def case(tokens: int, heads: int, width: int, ratio: int, pages: int = 0) -> list:
    """Arguments of the operator, rows of random lengths and positions, the first as long as can be
    and the second empty."""
    window_cache = filled(5, 256, 4)
    window_lengths = torch.randint(0, 129, (tokens,), device=DEVICE)
    lengths = torch.randint(0, width + 1, (tokens,), device=DEVICE)
    window_lengths[:1], lengths[:1], window_lengths[1:2], lengths[1:2] = 128, width, 0, 0
    q = torch.randn(tokens, heads, 512, device=DEVICE).to(torch.bfloat16)
    window = lists(tokens, 128, window_lengths, window_cache, 4, last=True)
    rest = [
        torch.randn(heads, device=DEVICE),
        SCALE,
        *rotation(torch.randint(1 << 20, (tokens,), device=DEVICE), FREQUENCIES.to(DEVICE)),
    ]
    if not ratio:
        return [q, window_cache, window, None, None, *rest]
    slots_per_page = 256 // ratio
    used = max(2, -(-width // slots_per_page))
    cache = filled(max(pages, used + 1), slots_per_page, used)
    return [
        q,
        window_cache,
        window,
        cache,
        lists(tokens, width, lengths, cache, used, last=False),
        *rest,
    ]


def reference(arguments: list) -> torch.Tensor:
    """The reference in fp32, which multiplies absent latents by zero, with slot 0 cleared of its
    poison meanwhile."""
    caches = [arguments[1], arguments[3]]
    for cache in filter(None, caches):
        cache.store(
            torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, 512, device=DEVICE)
        )
    expected = sparse_mla.reference(arguments[0].float(), *arguments[1:])
    for cache in filter(None, caches):
        cache.pages[0].fill_(0xFF)
    return expected


def compare(kernel, arguments: list, **tolerance: float) -> None:
    torch.testing.assert_close(
        kernel(*arguments).float(), reference(arguments), **(tolerance or TOLERANCE)
    )


@pytest.mark.parametrize(
    ("heads", "width", "ratio"),
    [
        (8, 512, 4),
        (16, 1024, 4),
        (32, 512, 4),
        (64, 512, 4),
        (128, 1024, 4),
        (16, 8192, 128),
        (128, 8192, 128),
        (16, 0, 0),
    ],
)
@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 600])
def test_matches_reference(kernel, tokens, heads, width, ratio):
    compare(kernel, case(tokens, heads, width, ratio))


def test_prefill(kernel):
    compare(kernel, case(4096, 16, 1024, 4))


def test_pool_over_2_gib(kernel):
    """The latents lie past 2^31 bytes of the pool."""
    slots_per_page = 64
    pages = (2 << 30) // latent_page_bytes(slots_per_page) + 40
    arguments = case(8, 16, 1024, 4, pages)
    assert int(arguments[4].max()) // slots_per_page * latent_page_bytes(slots_per_page) > 1 << 31
    compare(kernel, arguments)


@pytest.mark.parametrize("tokens", [4, 64])
def test_graph_replay_equals_eager(kernel, tokens):
    """A captured graph over lists of the greatest width, replayed on shorter rows, whatever memory
    held before."""
    arguments = case(tokens, 16, 8192, 128)
    kernel(*arguments)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(*arguments)
    slots = arguments[4].clone()
    for length in (8192, 65, 64, 1, 0):
        arguments[4].copy_(slots.masked_fill(torch.arange(8192, device=DEVICE) >= length, -1))
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, kernel(*arguments)), length
        torch.testing.assert_close(replayed.float(), reference(arguments), **TOLERANCE)


def test_repeats_bit_for_bit(kernel):
    """No race between waves or splits: 50 runs give the same bits."""
    arguments = case(8, 16, 1024, 4)
    first = kernel(*arguments)
    assert all(torch.equal(first, kernel(*arguments)) for _ in range(50))
