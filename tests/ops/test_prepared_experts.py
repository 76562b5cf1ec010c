"""Experts in the order of the FlyDSL kernels: nothing is lost, and what does not fit is refused."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from dsv4_plugin import device
from dsv4_plugin.checkpoint.tiny import tiny_config
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.formats import quantize_weight_fp4
from dsv4_plugin.kernels.flydsl import prepared
from dsv4_plugin.kernels.flydsl.prepared import (
    DOWN,
    FP4_LAYOUT,
    GATE_UP,
    LayoutError,
    PreparedExperts,
)
from dsv4_plugin.model.build import Build
from dsv4_plugin.model.feed_forward import FeedForward
from dsv4_plugin.ops import moe
from dsv4_plugin.ops.operator import Implementation, SelectionError
from dsv4_plugin.parallel import Parallel

INNER, WIDE = 128, 512
LOAD = Implementation.load


def released(inner: int = INNER, wide: int = WIDE, experts: int = 3) -> list[torch.Tensor]:
    parts = []
    for rows, columns in ((inner, wide), (wide, inner), (inner, wide)):
        pairs = [quantize_weight_fp4(torch.randn(rows, columns)) for _ in range(experts)]
        parts.append(torch.stack([codes for codes, _ in pairs]))
        scales = torch.stack([scale.view(torch.uint8) for _, scale in pairs])
        parts.append(scales.view(torch.float8_e8m0fnu))
    return parts


def test_what_was_prepared_gives_the_released_bytes_back():
    parts = released(inner=384)
    gate_up, _, down, *_ = prepared.prepare(*parts)
    assert gate_up.shape == (3, 768, 512) and down.shape == (3, 512, 384)
    for found, expected in zip(prepared.released(gate_up, down), parts, strict=True):
        assert found.dtype == expected.dtype
        assert found.view(torch.uint8).equal(expected.view(torch.uint8))


def released_fp8(inner: int, wide: int, experts: int = 3) -> list[torch.Tensor]:
    parts = []
    for rows, columns in ((inner, wide), (wide, inner), (inner, wide)):
        parts.append(torch.randn(experts, rows, columns).to(torch.float8_e4m3fn))
        parts.append(torch.rand(experts, rows // 128, columns // 128))
    return parts


def test_fp8_is_given_back_too():
    parts = released_fp8(inner=384, wide=256)
    gate_up, _, down, *_ = prepared.prepare(*parts)
    assert gate_up.shape == (3, 768, 256) and down.shape == (3, 256, 384)
    for found, expected in zip(prepared.released(gate_up, down), parts, strict=True):
        assert found.dtype == expected.dtype
        assert found.view(torch.uint8).equal(expected.view(torch.uint8))


def test_a_lane_holds_two_pieces_of_fp8():
    """Written out: row 37 of expert 1 of `w2`, columns 256 .. 383 of 384: tile 2, row 5 of it, step
    2; group 2 of lanes holds columns 32 .. 47 of those and 96 .. 111."""
    parts = released_fp8(inner=384, wide=256)
    down = prepared.prepare(*parts)[2]
    row = parts[2][1, 37].view(torch.uint8)
    for half, column in ((0, 256 + 32), (1, 256 + 96)):
        start = (((2 * 3 + 2) * 2 + half) * 64 + 16 * 2 + 5) * 16
        assert down.data[1].flatten()[start : start + 16].equal(row[column : column + 16])


def test_a_lane_holds_what_the_instruction_takes():
    """Written out: row 37 of expert 1, columns 320 .. 351 of `w2`'s 384: tile 2, row 5 of it, step
    2, group 2 of lanes."""
    parts = released(inner=384)
    down = prepared.prepare(*parts)[2]
    lane = 16 * 2 + 5
    data = down.data[1].flatten()[((2 * 3 + 2) * 64 + lane) * 16 :][:16]
    assert data.equal(parts[2][1, 37].view(torch.uint8)[160:176])
    scale = down.scales[1].flatten()[((0 * 3 + 2) * 64 + lane) * 4 + 2]
    assert scale == parts[3][1, 37].view(torch.uint8)[10]


def test_the_definition_reads_prepared_weights():
    parts = released()
    x, weights = torch.randn(5, WIDE).bfloat16(), torch.rand(5, 2)
    experts = torch.tensor([[0, 1], [2, 0], [1, 2], [5, 0], [-1, 2]])
    expected = moe.reference(x, weights, experts, *parts, 10.0)
    assert moe.reference(x, weights, experts, *prepared.prepare(*parts), 10.0).equal(expected)


@pytest.mark.parametrize(
    ("inner", "wide", "named"),
    [(192, 512, "intermediate size 192"), (128, 704, "hidden size 704")],
)
def test_shapes_that_do_not_fit_are_refused(inner, wide, named):
    with pytest.raises(LayoutError, match=named):
        prepared.prepare(*released(inner, wide))


def test_other_forms_are_refused():
    dense = torch.zeros(2, 128, 512, dtype=torch.bfloat16)
    with pytest.raises(LayoutError, match="bfloat16, neither packed FP4 nor FP8"):
        prepared.prepare(dense, None, dense, None, dense, None)


@pytest.mark.parametrize(
    ("kind", "layout"), [(DOWN, FP4_LAYOUT), (GATE_UP, "fp4 by lanes of 32x32x64")]
)
def test_an_order_that_a_kernel_does_not_read_is_an_error(kind, layout):
    data = torch.zeros(1, 256, 256, dtype=torch.uint8)
    weights = PreparedExperts(data, data[..., :16], kind, layout)
    with pytest.raises(LayoutError, match=f"{kind!r} in the order {layout!r}"):
        weights.require(GATE_UP, FP4_LAYOUT)


def test_a_mistake_in_preparing_is_found(monkeypatch):
    right = prepared._scales
    monkeypatch.setattr(prepared, "_scales", lambda rows: right(rows).roll(1))
    with pytest.raises(LayoutError, match="was not prepared as released"):
        prepared.prepare(*released())


def test_only_the_implementation_they_are_for_takes_them():
    gate_up, _, down, *_ = prepared.prepare(*released())
    x = torch.zeros(1, WIDE, dtype=torch.bfloat16)
    arguments = x, torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    triton, flydsl = moe.implementations["triton"], moe.implementations["flydsl"]
    assert triton.requires(*arguments, gate_up) == "the weights are prepared for flydsl"
    assert flydsl.requires(*arguments, gate_up) is None
    assert "as released" in flydsl.requires(*arguments, torch.zeros(1))


@pytest.fixture
def asked(monkeypatch):
    """A gfx950 with FlyDSL, whose experts were asked for by name."""
    monkeypatch.setattr(device, "arch", lambda: "gfx950")
    monkeypatch.setattr(device, "package_version", lambda name: "0.4.2")
    monkeypatch.setattr(Implementation, "load", lambda self: None)
    monkeypatch.setenv("DSV4_MOE", "flydsl")
    monkeypatch.setenv("DSV4_WEIGHTS", "packed")
    yield monkeypatch
    monkeypatch.undo()
    moe.configure()


def feed_forward(expert_dtype: str = "fp4") -> FeedForward:
    geometry = Geometry.from_config(
        tiny_config(hidden=512, intermediate=128, experts=4, layers=3)
        | {"expert_dtype": expert_dtype}
    )
    build = Build(geometry, Precision.SERVING, Parallel(), torch.device("cpu"))
    return FeedForward(build, layer=2)


def test_a_layer_gives_up_its_released_weights(asked):
    moe.configure()
    for expert_dtype in ("fp4", "fp8"):
        layer = feed_forward(expert_dtype)
        layer.prepare()
        assert layer.is_prepared and layer.experts.w1.weight is None


def test_a_layer_that_is_left_out_keeps_them(asked):
    asked.setenv("DSV4_LAYERS_MOE", "0,1")
    moe.configure()
    layer = feed_forward()
    layer.prepare()
    assert not layer.is_prepared and layer.experts.w1.weight is not None


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"arch": lambda: "gfx942"}, "gfx942 is not one of gfx950"),
        ({"package_version": lambda name: None}, "package flydsl is not installed"),
        ({"package_version": lambda name: "0.3.0"}, "package flydsl is 0.3.0, not 0.4.2"),
        ({"arch": lambda: device.CPU, "interprets_triton": lambda: True}, "there is no GPU$"),
    ],
)
def test_what_the_machine_lacks_is_named(asked, facts, named):
    for fact, value in facts.items():
        asked.setattr(device, fact, value)
    with pytest.raises(SelectionError, match=f"DSV4_MOE=flydsl cannot run here: {named}"):
        moe.configure()


def test_a_process_with_another_mlir_is_refused_not_aborted(asked):
    asked.setattr(Implementation, "load", LOAD)
    asked.setitem(sys.modules, "cutlass._mlir", types.ModuleType("cutlass._mlir"))
    with pytest.raises(SelectionError, match="cannot be loaded: .*uninstall nvidia-cutlass-dsl"):
        moe.configure()


def test_weights_it_cannot_take_end_the_loading(asked):
    asked.setenv("DSV4_WEIGHTS", "dense")
    moe.configure()
    with pytest.raises(SelectionError, match="DSV4_MOE=flydsl cannot run layer 2: the experts are"):
        feed_forward().prepare()
