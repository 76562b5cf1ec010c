"""The calls of route, moe and shared_expert that benchmarks/kernels.py checks and times.

Weights are random bytes of FP4 and FP8 with scales near 1/sqrt(inputs): what they are does not
change the time. Routing is uniform; moe also gets a step in which one expert takes all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import floors
import torch
from kernel_cases import Call, Case, Model, Step, bf16
from torch import Tensor

from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.ops.operator import OPERATORS

LIMIT = 10.0
_TINY = 64


@dataclass(frozen=True)
class Share:
    """One rank's part of the experts."""

    hidden: int
    experts: int
    """Of the model; `held` of them are here."""
    held: int
    inner: int
    topk: int = 6


def share(model: Model, topk: int) -> Share:
    """By the model's name; experts are split by their intermediate size, with dp by number. What an
    interpreter runs, whose `topk` of the indexer is small, has few and small experts."""
    config, _, layout = model.name.partition("-")
    geometry = load_geometry(config)
    hidden, experts, inner = (
        geometry.hidden_size,
        geometry.n_routed_experts,
        geometry.moe_intermediate_size,
    )
    if topk <= _TINY:
        return Share(256, 8, 8, 128)
    if layout == "tp8":
        return Share(hidden, experts, experts, inner // 8)
    return Share(hidden, experts, experts // (8 if layout else 1), inner)


def _fp4(experts: int, outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.randint(
        -128, 128, (experts, outputs, inputs // 2), dtype=torch.int8, device=device
    )
    return codes, _scales((experts, outputs, inputs // 32), inputs, 2, device)


def _fp8(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    weight = torch.randn(outputs, inputs, device=device).mul_(32).to(torch.float8_e4m3fn)
    return weight, _scales((-(-outputs // 128), -(-inputs // 128)), inputs, 5, device)


def _scales(shape: tuple[int, ...], inputs: int, size: int, device: torch.device) -> Tensor:
    """ue8m0 bytes that bring values of 2^`size` near 1/sqrt(`inputs`)."""
    middle = 127 - size - (inputs.bit_length() - 1) // 2
    found = torch.randint(middle - 1, middle + 2, shape, dtype=torch.uint8, device=device)
    return found.view(torch.float8_e8m0fnu)


def _routing(step: Step, held: Share, skewed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(weights, experts) of every row: uniform, or all on one expert."""
    weights = torch.rand(step.tokens, held.topk, device=device) + 0.1
    if skewed:
        return weights, torch.zeros(step.tokens, held.topk, dtype=torch.int64, device=device)
    scores = torch.rand(step.tokens, held.experts, device=device)
    return weights, scores.topk(held.topk, -1, sorted=False).indices.contiguous()


def routes(model: Model, step: Step, topk: int) -> Iterator[Case]:
    """The router of a layer that chooses."""
    here = share(model, topk)

    def make(device: torch.device) -> Call:
        x = bf16(step.tokens, here.hidden, device=device)
        gate = bf16(here.experts, here.hidden, device=device) * here.hidden**-0.5
        bias = torch.randn(here.experts, device=device) * 0.3
        ids = torch.zeros(step.tokens, dtype=torch.int64, device=device)
        rest = (here.topk, 2.5)
        return Call(
            OPERATORS["route"],
            (x, gate, bias, None, ids, *rest),
            floors.route(step.tokens, here.experts, here.hidden, here.topk),
            step.tokens,
            lambda rows: (x[rows], gate, bias, None, ids[rows], *rest),
        )

    memory = step.tokens * (here.hidden * 6 + here.experts * 48) + here.experts * here.hidden * 6
    label = f"{_rows(step)}, {here.experts} experts of {here.hidden}"
    yield Case("route", model.name, label, memory, make)


def experts(model: Model, step: Step, topk: int) -> Iterator[Case]:
    """FP4 experts under uniform routing, and for a decode step all rows on one."""
    here = share(model, topk)
    matrix = here.inner * here.hidden
    weights_bytes = 3 * here.held * matrix * 17 // 32
    pairs = step.tokens * here.topk

    def case(skewed: bool) -> Case:
        def make(device: torch.device) -> Call:
            x = bf16(step.tokens, here.hidden, device=device)
            weights, chosen = _routing(step, here, skewed, device)
            shapes = (here.inner, here.hidden), (here.hidden, here.inner), (here.inner, here.hidden)
            parts = [each for shape in shapes for each in _fp4(here.held, *shape, device)]
            local = chosen[chosen < here.held]
            floor = floors.moe(
                step.tokens, local.numel(), local.unique().numel(), here.hidden, here.inner
            )
            return Call(
                OPERATORS["moe"],
                (x, weights, chosen, *parts, LIMIT, 0),
                floor,
                step.tokens,
                lambda rows: (x[rows], weights[rows], chosen[rows], *parts, LIMIT, 0),
            )

        routed = "one expert" if skewed else "uniform"
        label = f"{_rows(step)}, {here.held} of {here.experts} experts of {here.inner}, {routed}"
        used = weights_bytes + pairs * (here.hidden * 2 + here.inner * 3) + matrix * 12
        return Case("moe", model.name, label, used + step.tokens * here.hidden * 12, make)

    yield case(False)
    if step.phase == "decode":
        yield case(True)


def shared(model: Model, step: Step, topk: int) -> Iterator[Case]:
    """The shared expert in FP8; with dp it is whole on every rank."""
    here = share(model, topk)

    def make(device: torch.device) -> Call:
        x = bf16(step.tokens, here.hidden, device=device)
        shapes = (here.inner, here.hidden), (here.hidden, here.inner), (here.inner, here.hidden)
        parts = [each for shape in shapes for each in _fp8(*shape, device)]
        return Call(
            OPERATORS["shared_expert"],
            (x, *parts, LIMIT),
            floors.shared_expert(step.tokens, here.hidden, here.inner),
            step.tokens,
            lambda rows: (x[rows], *parts, LIMIT),
        )

    memory = here.inner * here.hidden * 24 + step.tokens * (here.hidden * 10 + here.inner * 3)
    label = f"{_rows(step)}, {here.hidden} by {here.inner}"
    yield Case("shared_expert", model.name, label, memory, make)


def _rows(step: Step) -> str:
    return step.label.split(" x ")[0]


MAKERS: dict[str, Callable[[Any, Step, int], Iterator[Case]]] = {
    "route": routes,
    "moe": experts,
    "shared_expert": shared,
}
