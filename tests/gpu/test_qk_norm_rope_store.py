"""qk_norm_rope_store on a GPU: released shapes, graph replay, a pool over 2 GiB."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.cache import PackedLatentCache, latent_page_bytes
from dsv4_plugin.ops import qk_norm_rope_store
from dsv4_plugin.ops.rope import rotation

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_cache(pages: int = 40) -> PackedLatentCache:
    return PackedLatentCache(
        torch.full((pages, latent_page_bytes(256)), 0xA5, dtype=torch.uint8, device=DEVICE), 256
    )


def make_inputs(tokens: int, heads: int) -> tuple:
    def bf16(*shape: int):
        return torch.randn(*shape, device=DEVICE).bfloat16()

    positions = torch.randint(0, 1 << 20, (tokens,), device=DEVICE)
    frequencies = 160000 ** -(torch.arange(0, 64, 2, device=DEVICE) / 64)
    return (
        bf16(tokens, heads, 512),
        bf16(tokens, 512),
        bf16(512),
        1e-6,
        *rotation(positions, frequencies),
    )


def run(
    implementation, inputs: tuple, slots: torch.Tensor
) -> tuple[torch.Tensor, PackedLatentCache]:
    cache = make_cache()
    return implementation(*inputs, slots, cache), cache


@pytest.mark.parametrize("heads", [8, 16, 64, 128])
@pytest.mark.parametrize("tokens", [0, 1, 7, 512, 8192])
def test_matches_reference(tokens, heads):
    inputs, slots = make_inputs(tokens, heads), torch.randperm(40 * 256, device=DEVICE)[:tokens]
    kernel = qk_norm_rope_store.implementations["triton"].load()
    (q, cache), (want_q, want) = (
        run(kernel, inputs, slots),
        run(qk_norm_rope_store.reference, inputs, slots),
    )
    if not tokens:
        assert (cache.pages == 0xA5).all()
        return
    # Another order of sums and fused multiply-adds move values by some 1e-7: few round to the
    # neighbouring bf16 (2^-7) or e4m3 (2^-3; subnormals by 2^-16 of the block's largest).
    assert (q != want_q).float().mean() < 5e-3
    torch.testing.assert_close(q.float(), want_q.float(), rtol=2**-7, atol=2**-7)
    got, expected = cache.load(slots), want.load(slots)
    assert (got != expected).float().mean() < 5e-3
    torch.testing.assert_close(got, expected, rtol=2**-3, atol=2**-16 * expected.abs().max().item())


def test_graph_replay_equals_eager():
    kernel = qk_norm_rope_store.implementations["triton"].load()
    inputs, slots, cache = make_inputs(64, 16), torch.arange(64, device=DEVICE), make_cache()
    kernel(*inputs, slots, cache)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(*inputs, slots, cache)
    for static, fresh in zip(
        (*inputs, slots), (*make_inputs(64, 16), torch.randperm(5000, device=DEVICE)[:64])
    ):
        if isinstance(static, torch.Tensor):
            static.copy_(fresh)
    cache.pages.fill_(0xA5)
    graph.replay()
    q, eager = run(kernel, inputs, slots)
    assert torch.equal(out, q) and torch.equal(cache.pages, eager.pages)


def test_pool_over_two_gigabytes():
    pages = (1 << 32) // latent_page_bytes(256) + 2
    cache = PackedLatentCache(
        torch.empty(pages, latent_page_bytes(256), dtype=torch.uint8, device=DEVICE), 256
    )
    inputs, slots = (
        make_inputs(3, 8),
        torch.tensor([pages * 256 - 1, pages * 128, 5], device=DEVICE),
    )
    qk_norm_rope_store.implementations["triton"].load()(*inputs, slots, cache)
    _, near = run(
        qk_norm_rope_store.implementations["triton"].load(), inputs, torch.arange(3, device=DEVICE)
    )
    assert torch.equal(cache.load(slots), near.load(torch.arange(3, device=DEVICE)))
