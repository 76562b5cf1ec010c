"""Hyper-connections in Triton against their references, and against themselves in other batches."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.formats import dequantize_fp8, quantize_fp8
from dsv4_plugin.kernels.triton import mhc as kernels
from dsv4_plugin.ops import mhc_head, mhc_post, mhc_post_pre, mhc_pre

ITERATIONS, EPS, NORM_EPS = 20, 1e-6, 1e-6


def parameters(dim: int, mixes: int, spread: float = 1.0, seed: int = 1) -> tuple:
    """(fn, base, scale, norm weight) of a site with 24 mixes or of the head with 4."""
    random = torch.Generator().manual_seed(seed)
    fn = torch.randn(mixes, 4 * dim, generator=random) * (4 * dim) ** -0.5 * spread
    base = torch.randn(mixes, generator=random) * 0.4
    scale = 1 + 0.3 * torch.randn(3 if mixes == 24 else 1, generator=random)
    return fn, base, scale, (1 + 0.1 * torch.randn(dim, generator=random)).bfloat16()


def make_streams(rows: int, dim: int, scale: float = 1.0, seed: int = 2) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, 4, dim, generator=random) * scale).bfloat16()


def make_output(rows: int, dim: int) -> tuple:
    """(y, post, comb) of a sub-layer that ran."""
    random = torch.Generator().manual_seed(3)
    comb = torch.randn(rows, 4, 4, generator=random).softmax(-1)
    post = 2 * torch.randn(rows, 4, generator=random).sigmoid()
    return torch.randn(rows, dim, generator=random).bfloat16(), post, comb


def settings(mixes: int = 24) -> tuple:
    return (ITERATIONS, EPS, NORM_EPS, True) if mixes == 24 else (EPS, NORM_EPS)


def assert_entry(got: tuple, want: tuple) -> None:
    """(input, codes, scales, post, comb) of a sub-layer."""
    # The mixes are fp32 sums of up to 2^15 products in another order, 1e-6 of them, which Sinkhorn
    # contracts; so a bf16 result rarely rounds the other way, by 2^-8, twice with the norm.
    for index in (3, 4):
        torch.testing.assert_close(got[index], want[index], rtol=2e-5, atol=2e-6)
    assert (got[0] != want[0]).float().mean() < 1e-2
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2**-6, atol=1e-6)
    # Codes and scales are exactly those of the bf16 input beside them.
    codes, scale = quantize_fp8(got[0], 128)
    assert torch.equal(got[1].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(got[2], scale)
    assert torch.isfinite(dequantize_fp8(got[1], got[2])).all()


@pytest.mark.parametrize("rows, dim", [(1, 128), (35, 384)])
def test_pre(rows, dim):
    arguments = (make_streams(rows, dim), *parameters(dim, 24), *settings())
    assert_entry(kernels.mhc_pre(*arguments), mhc_pre.reference(*arguments))


@pytest.mark.parametrize("rows, dim", [(1, 128), (35, 384)])
def test_between_two_sub_layers(rows, dim):
    y, post, comb = make_output(rows, dim)
    arguments = (y, make_streams(rows, dim), post, comb, *parameters(dim, 24), *settings())
    got, want = kernels.mhc_post_pre(*arguments), mhc_post_pre.reference(*arguments)
    # five fp32 terms in another order: some sums round to the neighbouring bf16
    assert (got[0] != want[0]).float().mean() < 2e-3
    torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2**-7, atol=1e-6)
    assert_entry(got[1:], mhc_pre.reference(got[0], *arguments[4:]))
    assert torch.equal(got[0], kernels.mhc_post(*arguments[:4]))


@pytest.mark.parametrize("rows, dim", [(1, 128), (3, 1280)])
def test_post(rows, dim):
    y, post, comb = make_output(rows, dim)
    arguments = (y, make_streams(rows, dim), post, comb)
    got, want = kernels.mhc_post(*arguments), mhc_post.reference(*arguments)
    assert (got != want).float().mean() < 2e-3
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("rows, dim", [(1, 128), (33, 256)])
def test_head(rows, dim):
    arguments = (make_streams(rows, dim), *parameters(dim, 4), *settings(4))
    got, want = kernels.mhc_head(*arguments), mhc_head.reference(*arguments)
    assert (got != want).float().mean() < 1e-2
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=1e-6)


def test_head_without_its_norm():
    fn, base, scale, _ = parameters(128, 4)
    arguments = (make_streams(3, 128), fn, base, scale, None, *settings(4))
    got, want = kernels.mhc_head(*arguments), mhc_head.reference(*arguments)
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=1e-6)


def test_a_row_has_the_same_bits_in_any_batch(sums_in_order):
    dim, rows = 256, 40
    y, post, comb = make_output(rows, dim)
    streams, tail = make_streams(rows, dim), (*parameters(dim, 24), *settings())
    whole = kernels.mhc_post_pre(y, streams, post, comb, *tail)
    head = kernels.mhc_head(streams, *parameters(dim, 4), *settings(4))
    for part in (slice(0, 1), slice(33, 34), slice(7, 40)):
        some = kernels.mhc_post_pre(y[part], streams[part], post[part], comb[part], *tail)
        for one, all_rows in zip(some, whole):
            assert torch.equal(one.float(), all_rows[part].float())
        assert torch.equal(
            head[part], kernels.mhc_head(streams[part], *parameters(dim, 4), *settings(4))
        )


def test_the_product_is_exact_where_fp32_sums_are():
    """Each weight has 24 bits, one in every stripe: TF32 or two pieces of bf16 would lose the
    last."""
    dim = 256
    streams = torch.zeros(1, 4, dim).bfloat16()
    streams[0, 1, 130] = 3.0
    fn = torch.zeros(24, 4 * dim)
    fn[:, dim + 130] = 1 + torch.arange(24) * 2.0**-23 + 2.0**-12
    _, partial = kernels._project(streams, fn)
    assert torch.equal(partial.sum(0)[0, :24], 3 * fn[:, dim + 130])
    assert partial.sum(0)[0, 24] == 9


@pytest.mark.parametrize("spread", [60.0, 1e4])
def test_extreme_logits(spread):
    """Sigmoids at 0 and 1 and a Sinkhorn start of one-hot rows stay finite, as the reference's."""
    arguments = (make_streams(3, 128), *parameters(128, 24, spread), *settings())
    got, want = kernels.mhc_pre(*arguments), mhc_pre.reference(*arguments)
    assert all(part.float().isfinite().all() for part in got)
    # The logits reach 1e4 and are off by 1e-6 of that; exp makes it 1e-2 of a cell.
    torch.testing.assert_close(got[4], want[4], rtol=3e-2, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
def test_extreme_streams(scale):
    arguments = (make_streams(2, 128, scale), *parameters(128, 24), *settings())
    assert_entry(kernels.mhc_pre(*arguments), mhc_pre.reference(*arguments))


def test_streams_that_are_one_embedding():
    """The first layer's four streams are one row, expanded: strides 0."""
    one = make_streams(3, 128)[:, :1]
    arguments = (*parameters(128, 24), *settings())
    got = kernels.mhc_pre(one.expand(-1, 4, -1), *arguments)
    want = kernels.mhc_pre(one.expand(-1, 4, -1).contiguous(), *arguments)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(got, want))


def test_no_rows_and_no_codes():
    streams, tail = make_streams(0, 128), parameters(128, 24)
    x, codes, scale, post, comb = kernels.mhc_pre(streams, *tail, ITERATIONS, EPS, NORM_EPS, False)
    assert codes is None and scale is None
    assert (x.shape, post.shape, comb.shape) == ((0, 128), (0, 4), (0, 4, 4))
    y, post, comb = make_output(0, 128)
    assert kernels.mhc_post(y, streams, post, comb).shape == (0, 4, 128)
    assert kernels.mhc_post_pre(y, streams, post, comb, *tail, *settings())[0].shape == (0, 4, 128)
    assert kernels.mhc_head(streams, *parameters(128, 4), *settings(4)).shape == (0, 128)
