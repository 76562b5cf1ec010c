"""shared_expert in Triton: every form against an expert computed with the same roundings."""

from __future__ import annotations

import pytest
import torch
from expert_weights import FORMS, LIMIT, TWO_CODES, decoded, expert, matrices, one, row_error

from dsv4_plugin.kernels.triton import experts as launches
from dsv4_plugin.kernels.triton import shared_expert as kernels
from dsv4_plugin.kernels.triton.experts import Tile, Tiles
from dsv4_plugin.ops import shared_expert

FEW = Tiles(16, Tile(16, 128, 1, 1), Tile(64, 128, 1, 1))
MANY = Tiles(64, Tile(128, 128, 1, 1), Tile(256, 128, 1, 1))


def triton(*arguments):
    return shared_expert.implementations["triton"].load()(*arguments)


@pytest.fixture(params=[FEW, MANY], ids=["few", "many"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(kernels, "tiles_of", lambda rows: request.param)


def make_inputs(rows: int, hidden: int, inner: int, form: str, scale: float = 2.0) -> tuple:
    x = (torch.randn(rows, hidden) * scale).bfloat16()
    return x, matrices(1, inner, hidden, form)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("rows, inner", [(1, 384), (19, 192)])
def test_matches_an_expert_with_the_same_roundings(form, rows, inner, tiles):
    x, parts = make_inputs(rows, 256, inner, form)
    got = triton(x, *one(parts, 0), LIMIT)
    assert got.dtype == torch.float32
    want = expert(x, 1.0, *decoded(parts, 0), rounded=form != "bf16")
    assert row_error(got, want) < TWO_CODES


def test_what_rounding_activations_costs(monkeypatch):
    """As in moe: e4m3 moves a row by some 4 %, bf16 by 0.4 %."""
    x, parts = make_inputs(20, 512, 384, "fp8")
    want = shared_expert.reference(x, *one(parts, 0), LIMIT)
    with_rounding = row_error(triton(x, *one(parts, 0), LIMIT), want)
    monkeypatch.setattr(launches, "_ROUNDING", {})
    without = row_error(triton(x, *one(parts, 0), LIMIT), want)
    print(f"from the reference: rounded {with_rounding:.4f}, unrounded {without:.4f}")
    assert 0.02 < with_rounding < 0.075 and without < 0.01


def test_the_clamp_is_inside():
    """Bug of 25070: the shared expert is clamped too."""
    x, parts = make_inputs(5, 256, 128, "fp8", scale=30.0)
    got = triton(x, *one(parts, 0), LIMIT)
    assert row_error(got, expert(x, 1.0, *decoded(parts, 0), rounded=True)) < TWO_CODES
    assert row_error(triton(x, *one(parts, 0), 1e9), got) > 0.5


def test_a_row_has_the_same_bits_in_any_batch(monkeypatch, sums_in_order):
    x, parts = make_inputs(20, 256, 256, "fp8")
    monkeypatch.setattr(kernels, "tiles_of", lambda rows: MANY if rows > 1 else FEW)
    together = triton(x, *one(parts, 0), LIMIT)
    for row in (0, 19):
        assert torch.equal(triton(x[[row]], *one(parts, 0), LIMIT)[0], together[row])


def test_what_is_no_number_stays_in_its_row(tiles):
    x, parts = make_inputs(4, 128, 128, "fp8")
    want = triton(x, *one(parts, 0), LIMIT)
    x[1, 5] = float("nan")
    got = triton(x, *one(parts, 0), LIMIT)
    assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]]) and got[1].isnan().all()


def test_no_rows():
    x, parts = make_inputs(0, 128, 128, "bf16")
    assert triton(x, *one(parts, 0), LIMIT).shape == (0, 128)
