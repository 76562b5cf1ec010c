"""moe in Triton: every form against experts computed with the same roundings, and against the
reference."""

from __future__ import annotations

import pytest
import torch
from expert_weights import FORMS, LIMIT, TWO_CODES, decoded, expert, matrices, row_error

from dsv4_plugin.kernels.triton import experts as launches
from dsv4_plugin.kernels.triton import moe as kernels
from dsv4_plugin.kernels.triton.experts import Tile, Tiles
from dsv4_plugin.ops import moe

TOPK = 3
FEW = Tiles(16, Tile(32, 256, 1, 1), Tile(64, 128, 1, 1))
"""A decode step's: hidden values meet stage 2 in bf16 and are rounded there."""
MANY = Tiles(64, Tile(128, 128, 1, 1), Tile(256, 128, 1, 1))
"""A prefill's: stage 1 rounds hidden values."""


def triton(*arguments):
    return moe.implementations["triton"].load()(*arguments)


def as_bytes(part: torch.Tensor) -> torch.Tensor:
    return part.view(torch.uint8)


@pytest.fixture
def tiles(monkeypatch):
    def use(chosen: Tiles) -> None:
        monkeypatch.setattr(kernels, "tiles_of", lambda form, rows: chosen)

    return use


@pytest.fixture
def unrounded(monkeypatch):
    """As on chips whose matrix units do not take the weights' format."""
    monkeypatch.setattr(launches, "_ROUNDING", {})


def make_inputs(tokens: int, experts: int, hidden: int, scale: float = 2.0) -> tuple:
    x = (torch.randn(tokens, hidden) * scale).bfloat16()
    chosen = torch.rand(tokens, experts).argsort(-1)[:, :TOPK].contiguous()
    return x, torch.rand(tokens, TOPK) + 0.1, chosen


def rounded_alike(x, weights, chosen, parts, rounded: bool, first: int = 0) -> torch.Tensor:
    """Sum of experts in the order of choices, each rounded to bf16, as the kernel has it."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    held = parts[0].shape[0]
    for choice in range(chosen.shape[1]):
        for row, number in enumerate((chosen[:, choice] - first).tolist()):
            if 0 <= number < held:
                part = expert(
                    x[[row]], weights[row, choice], *decoded(parts, number), rounded=rounded
                )
                out[row] += part[0].bfloat16().float()
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [FEW, MANY], ids=["few", "many"])
def test_matches_experts_with_the_same_roundings(form, shape, tiles):
    tiles(shape)
    inputs, parts = make_inputs(11, 4, 256), matrices(4, 384, 256, form)
    got = triton(*inputs, *parts, LIMIT)
    assert got.dtype == torch.float32
    want = rounded_alike(*inputs, parts, rounded=form != "bf16")
    assert row_error(got, want) < TWO_CODES


@pytest.mark.parametrize("form", FORMS)
def test_matches_unrounded_experts(form, unrounded, tiles):
    tiles(FEW)
    inputs, parts = make_inputs(5, 4, 256), matrices(4, 256, 256, form)
    got = triton(*inputs, *parts, LIMIT)
    assert row_error(got, rounded_alike(*inputs, parts, rounded=False)) < 2e-3


@pytest.mark.parametrize("form", ["fp4", "fp8", "bf16"])
@pytest.mark.parametrize(
    "inner, hidden, shape", [(96, 128, FEW), (320, 384, MANY)], ids=["few", "many"]
)
def test_odd_sizes(form, inner, hidden, shape, tiles):
    """Intermediate sizes that are no multiple of 128, 64 or a tile: nothing past them counts."""
    tiles(shape)
    inputs, parts = make_inputs(5, 4, hidden), matrices(4, inner, hidden, form)
    got = triton(*inputs, *parts, LIMIT)
    assert row_error(got, rounded_alike(*inputs, parts, rounded=form != "bf16")) < TWO_CODES


def test_what_rounding_activations_costs(monkeypatch):
    """e4m3 has 3 bits of mantissa: a value moves by 2.6 % (the mean square of a uniform error up to
    2^-4 over an octave), so gate and up do, and hidden values once more. bf16 moves a row by
    0.4 %."""
    inputs, parts = make_inputs(24, 4, 512), matrices(4, 384, 512, "fp4")
    want = moe.reference(*inputs, *parts, LIMIT)
    with_rounding = row_error(triton(*inputs, *parts, LIMIT), want)
    monkeypatch.setattr(launches, "_ROUNDING", {})
    without = row_error(triton(*inputs, *parts, LIMIT), want)
    print(f"from the reference: rounded {with_rounding:.4f}, unrounded {without:.4f}")
    assert 0.02 < with_rounding < 0.075 and without < 0.01


def test_activations_that_reach_the_clamp():
    """Bug of 25070: gate from above, up on both sides, before they are multiplied."""
    inputs, parts = make_inputs(9, 4, 256, scale=30.0), matrices(4, 128, 256, "fp4")
    got = triton(*inputs, *parts, LIMIT)
    assert row_error(got, rounded_alike(*inputs, parts, rounded=True)) < TWO_CODES
    assert row_error(triton(*inputs, *parts, 1e9), got) > 0.5


def test_six_of_384_experts_and_one_that_takes_all(tiles):
    tiles(FEW)
    x, weights, _ = make_inputs(4, 384, 128)
    weights = torch.cat((weights, weights), 1)
    numbers = [3, 5, 7, 200, 250, 383]
    parts = matrices(6, 64, 128, "fp4")
    spread = [part.new_zeros(384, *part.shape[1:]) for part in map(as_bytes, parts)]
    for place, part in zip(spread, parts):
        place[numbers] = as_bytes(part)
    spread = [place.view(part.dtype) for place, part in zip(spread, parts)]
    for chosen in (numbers, [7] * 6):
        chosen = torch.tensor(chosen).expand(4, -1).contiguous()
        few = torch.tensor([numbers.index(number) for number in chosen[0].tolist()])
        got = triton(x, weights, chosen, *spread, LIMIT)
        want = rounded_alike(x, weights, few.expand(4, -1), parts, rounded=True)
        assert row_error(got, want) < TWO_CODES


def test_shares_of_the_experts_add_up():
    """Three processes with two experts each: what others hold is not read, and adds nothing."""
    inputs, parts = make_inputs(8, 6, 128), matrices(6, 128, 128, "fp4")
    whole = triton(*inputs, *parts, LIMIT)
    shares = [
        triton(*inputs, *(part[first : first + 2] for part in parts), LIMIT, first)
        for first in (0, 2, 4)
    ]
    assert all((share != whole).any() for share in shares)
    torch.testing.assert_close(sum(shares), whole, rtol=0, atol=1e-6 * whole.abs().max().item())


def test_shares_of_the_intermediate_size_add_up():
    """Two processes with half of each expert's columns: blocks of scales stay whole."""
    inputs, parts = make_inputs(9, 4, 128), matrices(4, 256, 128, "fp4")
    whole = triton(*inputs, *parts, LIMIT)
    w1, s1, w2, s2, w3, s3 = parts
    shares = []
    for half in (0, 1):
        rows, codes = slice(128 * half, 128 * half + 128), slice(64 * half, 64 * half + 64)
        scales = slice(4 * half, 4 * half + 4)
        cut = (w1[:, rows], s1[:, rows], w2[..., codes], s2[..., scales], w3[:, rows], s3[:, rows])
        shares.append(triton(*inputs, *(part.contiguous() for part in cut), LIMIT))
    # each expert's part is rounded to bf16 on either side
    assert row_error(sum(shares), whole) < 2**-7


@pytest.mark.parametrize("chosen", [-1, 4, 77])
def test_experts_of_nobody_give_zeros(chosen):
    """Rows that pad a graph (bug of 39804), and experts that other processes hold."""
    x, weights, experts = make_inputs(5, 4, 128)
    x[1] = float("nan")
    experts[1] = chosen
    parts = matrices(4, 64, 128, "fp4")
    got = triton(x, weights, experts, *parts, LIMIT)
    assert (got[1] == 0).all() and got.isfinite().all()
    assert not triton(x, weights, torch.full_like(experts, chosen), *parts, LIMIT).any()


def test_no_rows():
    parts = matrices(4, 64, 128, "fp4")
    assert triton(*make_inputs(0, 4, 128), *parts, LIMIT).shape == (0, 128)


@pytest.mark.parametrize("form", ["fp4", "fp8", "bf16"])
@pytest.mark.parametrize(
    "value, shape", [(float("nan"), MANY), (float("inf"), FEW)], ids=["nan", "inf"]
)
def test_what_is_no_number_stays_in_its_row(form, value, shape, tiles):
    tiles(shape)
    x, *rest = make_inputs(6, 3, 256)
    parts = matrices(3, 128, 256, form)
    want = triton(x, *rest, *parts, LIMIT)
    x[2, 77] = value
    got = triton(x, *rest, *parts, LIMIT)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], want[others])
    # An infinity may be clamped where inputs are not rounded; as e4m3 it has no value.
    assert got[2].isnan().all() or (form == "bf16" and value == float("inf"))


@pytest.mark.parametrize("form", ["fp4", "fp8"])
def test_a_row_has_the_same_bits_in_any_batch(form, tiles, sums_in_order):
    """Alone in the tiles of few rows, and among 24 in those of many, where stage 1 rounds."""
    x, weights, chosen = make_inputs(24, 2, 256)
    weights, chosen = weights[:, :2].contiguous(), chosen[:, :2].contiguous()
    parts = matrices(2, 256, 256, form)
    tiles(MANY)
    together = triton(x, weights, chosen, *parts, LIMIT)
    tiles(FEW)
    for row in (0, 23):
        alone = triton(x[[row]], weights[[row]], chosen[[row]], *parts, LIMIT)
        assert torch.equal(alone[0], together[row])


def test_an_intermediate_size_that_blocks_do_not_divide_is_named():
    with pytest.raises(ValueError, match="intermediate size 48 is not a multiple of 32"):
        triton(*make_inputs(2, 4, 128), *matrices(4, 48, 128, "bf16"), LIMIT)
