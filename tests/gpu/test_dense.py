"""Hyper-connections, norms, products and the greedy choice on a GPU: released shapes, the same bits
in any batch, graph replay, a weight past 2 GiB."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.formats import dequantize_fp8, quantize_fp8
from dsv4_plugin.ops import (
    block_fp8_linear,
    grouped_output,
    linear_fp32,
    mhc_head,
    mhc_post,
    mhc_post_pre,
    mhc_pre,
    rms_norm_quant,
    sample_greedy,
)

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOKENS = [1, 7, 64, 300, 4096]
EPS = 1e-6


def kernel(operator):
    return operator.implementations["triton"].load()


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


def packed(rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 0x78, (rows, inputs), dtype=torch.uint8, device=DEVICE)
    sign = torch.randint(0, 2, (rows, inputs), dtype=torch.uint8, device=DEVICE) << 7
    scale = torch.randint(116, 122, (rows // 128, inputs // 128), dtype=torch.uint8, device=DEVICE)
    return (codes | sign).view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def site(dim: int, mixes: int = 24) -> tuple:
    return (
        torch.randn(mixes, 4 * dim, device=DEVICE) * (4 * dim) ** -0.5,
        torch.randn(mixes, device=DEVICE) * 0.4,
        torch.rand(3 if mixes == 24 else 1, device=DEVICE) + 0.5,
        bf16(dim),
    )


def output(tokens: int, dim: int) -> tuple:
    """(y, streams, post, comb) of a sub-layer that ran."""
    comb = torch.rand(tokens, 4, 4, device=DEVICE).softmax(-1)
    return bf16(tokens, dim), bf16(tokens, 4, dim), torch.rand(tokens, 4, device=DEVICE), comb


def plain(value: torch.Tensor) -> torch.Tensor:
    return value.view(torch.uint8) if value.dtype.itemsize == 1 else value


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """bf16 after fp32 sums in another order: few values round to a neighbour, or to the next one
    after a second rounding."""
    assert got.isfinite().all()
    assert (got != want).float().mean() < 2e-2
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("tokens", [0, *TOKENS])
@pytest.mark.parametrize("dim", [4096, 7168])
def test_hyper_connections(tokens, dim):
    before, entry = output(tokens, dim), (*site(dim), 20, EPS, EPS, True)
    got = kernel(mhc_post_pre)(*before, *entry)
    want = mhc_post.reference(*before)
    if tokens:
        close(got[0], want)
        close(kernel(mhc_post)(*before), want)
    again = kernel(mhc_pre)(got[0], *entry)
    reference = mhc_pre.reference(got[0], *entry)
    for one, other in zip(got[1:], again):
        assert torch.equal(plain(one), plain(other))
    if tokens:
        close(again[0], reference[0])
        torch.testing.assert_close(again[3], reference[3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again[4], reference[4], rtol=1e-4, atol=1e-5)
        codes, scale = quantize_fp8(again[0], 128)
        assert torch.equal(plain(codes), plain(again[1])) and torch.equal(scale, again[2])
        head = (got[0], *site(dim, 4), EPS, EPS)
        close(kernel(mhc_head)(*head), mhc_head.reference(*head))


SHAPES = [(2048, 7168), (16384, 1536), (7168, 2048), (1536, 4096)]


@pytest.mark.parametrize("tokens", [0, *TOKENS])
@pytest.mark.parametrize("rows, inputs", SHAPES)
def test_fp8_products(tokens, rows, inputs):
    x, (weight, scale) = bf16(tokens, inputs), packed(rows, inputs)
    codes, x_scale = quantize_fp8(x, 128)
    got = kernel(block_fp8_linear)(codes, weight, scale, x_scale)
    assert torch.equal(got, kernel(block_fp8_linear)(x, weight, scale))
    if tokens:
        want = block_fp8_linear.reference(codes, weight, scale, x_scale).double()
        # FP8 matrix units may keep 14 bits of a sum of 128 products (sm_90).
        assert ((got.double() - want).norm(dim=1) / want.norm(dim=1)).max() < 4e-3


@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_bf16_products(tokens):
    x, weight = bf16(tokens, 7168), bf16(2624, 7168)
    parts = kernel(linear_fp32)(x, weight, (2048, 512, 64))
    want = linear_fp32.reference(x, weight)
    torch.testing.assert_close(torch.cat(parts, -1), want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("tokens", [0, *TOKENS])
@pytest.mark.parametrize("dense", [True, False])
def test_grouped_output(tokens, dense):
    o, weight, scale = bf16(tokens, 16, 512), *packed(2048, 4096)
    if dense:
        weight, scale = bf16(2048, 4096) * 2**-6, None
    codes, z_scale = kernel(grouped_output)(o, weight, scale, 2, True)
    z = kernel(grouped_output)(o, weight, scale, 2)
    want_codes, want_scale = quantize_fp8(z, 128)
    assert torch.equal(plain(codes), plain(want_codes)) and torch.equal(z_scale, want_scale)
    if tokens:
        rounded = o if dense else dequantize_fp8(*quantize_fp8(o, 128)).to(o.dtype)
        want = grouped_output.reference(rounded, weight, scale, 2).double()
        assert ((z.double() - want).norm(dim=1) / want.norm(dim=1)).max() < 1e-2


def test_a_row_has_the_same_bits_in_any_batch():
    """Split and whole products, every size of tile."""
    tokens = 4096
    x, (weight, scale), bf16_weight = bf16(tokens, 7168), packed(2048, 7168), bf16(1024, 7168)
    streams, entry = bf16(tokens, 4, 7168), (*site(7168), 20, EPS, EPS, True)
    whole = kernel(block_fp8_linear)(x, weight, scale)
    fp32, mixed = kernel(linear_fp32)(x, bf16_weight), kernel(mhc_pre)(streams, *entry)
    for count in (1, 5, 17, 33, 65, 257, 1000):
        part = slice(tokens - count, tokens)
        assert torch.equal(kernel(block_fp8_linear)(x[part], weight, scale), whole[part]), count
        assert torch.equal(kernel(linear_fp32)(x[part], bf16_weight), fp32[part]), count
        for one, other in zip(kernel(mhc_pre)(streams[part], *entry), mixed):
            assert torch.equal(plain(one), plain(other)[part]), count


def test_a_split_product_gives_the_same_every_time():
    """Whoever arrives last adds the parts in their order; two streams keep their own counters."""
    x, (weight, scale) = bf16(16, 7168), packed(2048, 7168)
    want, side = kernel(block_fp8_linear)(x, weight, scale), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(200):
        here = kernel(block_fp8_linear)(x, weight, scale)
        with torch.cuda.stream(side):
            there = kernel(block_fp8_linear)(x, weight, scale)
        torch.cuda.synchronize()
        assert torch.equal(here, want) and torch.equal(there, want)


def test_graph_replay_equals_eager():
    def run():
        codes, x_scale = kernel(rms_norm_quant)(x, norm, EPS, "fp8")[1:]
        y = kernel(block_fp8_linear)(codes, weight, scale, x_scale)
        return kernel(linear_fp32)(x, bf16_weight), kernel(sample_greedy)(y)

    x, norm, bf16_weight = bf16(16, 7168), bf16(7168), bf16(1024, 7168)
    weight, scale = packed(2048, 7168)
    run()  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        x.copy_(bf16(16, 7168))
        graph.replay()
        for got, want in zip(out, run()):
            assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_greedy(tokens):
    logits = torch.randn(tokens, 129280, device=DEVICE).mul_(8).round_()
    logits[:, ::7] = float("nan")
    assert torch.equal(kernel(sample_greedy)(logits), sample_greedy.reference(logits))


def test_a_weight_past_two_gigabytes():
    rows = (1 << 31) // 7168 // 128 * 128 + 256
    weight, scale = packed(256, 7168)
    large = torch.empty(rows, 7168, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    plain(large)[-256:] = plain(weight)
    scales = torch.full((rows // 128, 56), 127, dtype=torch.uint8, device=DEVICE)
    scales[-2:] = plain(scale)
    x = bf16(3, 7168)
    got = kernel(block_fp8_linear)(x, large, scales.view(torch.float8_e8m0fnu))
    # the small weight is split, the large one is not
    want = kernel(block_fp8_linear)(x, weight, scale)
    torch.testing.assert_close(got[:, -256:].float(), want.float(), rtol=2**-7, atol=1e-2)
