"""Calls of hyper-connections, norms, matrix products and the greedy choice (kernel_cases.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import floors
import torch
from kernel_cases import EPS, Call, Case, Model, Step, bf16
from torch import Tensor

from dsv4_plugin.ops.operator import OPERATORS

_LORA = 1024
"""Results of one group of the output projection."""


def _case(operator: str, model: Model, step: Step, what: str, memory: int, make: Callable) -> Case:
    return Case(operator, model.name, f"{step.label.split(' x ')[0]}, {what}", memory, make)


def _packed(rows: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A random FP8 weight; its scales are powers of two near 1."""
    codes = torch.randint(0, 0x78, (rows, inputs), dtype=torch.uint8, device=device)
    sign = torch.randint(0, 2, (rows, inputs), dtype=torch.uint8, device=device) << 7
    blocks = (-(-rows // 128), inputs // 128)
    scale = torch.randint(118, 121, blocks, dtype=torch.uint8, device=device)
    return (codes | sign).view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def _fp8(tokens: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x, scale = _packed(tokens, inputs, device)
    return x, torch.rand(tokens, scale.shape[1], device=device)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.view(torch.uint8)[rows].view(x.dtype) if x.dtype.itemsize == 1 else x[rows]


def _site(dim: int, mixes: int, device: torch.device) -> tuple[Tensor, ...]:
    return (
        torch.randn(mixes, 4 * dim, device=device) * (4 * dim) ** -0.5,
        torch.randn(mixes, device=device) * 0.4,
        torch.rand(3 if mixes > 4 else 1, device=device) + 0.5,
        bf16(dim, device=device),
    )


_SETTINGS = {24: (20, EPS, EPS, True), 4: (EPS, EPS)}


def _mhc(operator: str, mixes: int, enters: bool, leaves: bool, model: Model, step: Step) -> Case:
    tokens, dim = step.tokens, model.hidden

    def make(device: torch.device) -> Call:
        streams = bf16(tokens, 4, dim, device=device)
        by_row: tuple[Tensor, ...] = (streams,)
        if leaves:
            post = torch.rand(tokens, 4, device=device)
            comb = torch.rand(tokens, 4, 4, device=device).softmax(-1)
            by_row = (bf16(tokens, dim, device=device), streams, post, comb)
        site = (*_site(dim, mixes, device), *_SETTINGS[mixes]) if enters else ()
        return Call(
            OPERATORS[operator],
            (*by_row, *site),
            floors.mhc(tokens, dim, mixes, enters, leaves),
            tokens,
            lambda rows: (*(each[rows] for each in by_row), *site),
        )

    return _case(operator, model, step, f"{dim} channels", tokens * dim * 80, make)


def _norm(model: Model, step: Step) -> Iterator[Case]:
    for what, channels in (("low-rank query", model.q_lora_rank), ("hidden", model.hidden)):

        def make(device: torch.device, channels: int = channels) -> Call:
            x, weight = bf16(step.tokens, channels, device=device), bf16(channels, device=device)
            return Call(
                OPERATORS["rms_norm_quant"],
                (x, weight, EPS, "both"),
                floors.rms_norm_quant(step.tokens, channels),
                step.tokens,
                lambda rows: (x[rows], weight, EPS, "both"),
            )

        memory = step.tokens * channels * 24
        yield _case("rms_norm_quant", model, step, f"{what} of {channels}", memory, make)


def _linear(model: Model, step: Step) -> Iterator[Case]:
    shapes = {
        "wq_a + wkv": (model.q_lora_rank + 512, model.hidden),
        "wq_b + indexer": (model.heads * 512 + model.index_heads * 128, model.q_lora_rank),
        "wo_b": (model.hidden, model.groups * min(_LORA, model.hidden)),
    }
    for what, (outputs, inputs) in shapes.items():

        def make(device: torch.device, outputs: int = outputs, inputs: int = inputs) -> Call:
            (x, x_scale), weight = (
                _fp8(step.tokens, inputs, device),
                _packed(outputs, inputs, device),
            )
            return Call(
                OPERATORS["block_fp8_linear"],
                (x, *weight, x_scale),
                floors.product(step.tokens, outputs, inputs),
                step.tokens,
                lambda rows: (_rows(x, rows), *weight, x_scale[rows]),
            )

        memory = outputs * inputs * 9 + step.tokens * (inputs + outputs) * 8
        label = f"{what}, {inputs} to {outputs}"
        yield _case("block_fp8_linear", model, step, label, memory, make)


def _linear_fp32(model: Model, step: Step) -> Iterator[Case]:
    for what, outputs in (("c4", 2048 + 512 + model.index_heads), ("c128", 1024)):

        def make(device: torch.device, outputs: int = outputs) -> Call:
            x = bf16(step.tokens, model.hidden, device=device)
            weight = bf16(outputs, model.hidden, device=device) * model.hidden**-0.5
            return Call(
                OPERATORS["linear_fp32"],
                (x, weight),
                floors.product(step.tokens, outputs, model.hidden, fp8=False, out=4),
                step.tokens,
                lambda rows: (x[rows], weight),
            )

        memory = outputs * model.hidden * 8 + step.tokens * (model.hidden + outputs) * 8
        yield _case(
            "linear_fp32", model, step, f"{what}, {model.hidden} to {outputs}", memory, make
        )


def _grouped(model: Model, step: Step) -> Case:
    inputs, rank = model.heads // model.groups * 512, min(_LORA, model.hidden)

    def make(device: torch.device) -> Call:
        o = bf16(step.tokens, model.heads, 512, device=device)
        weight = _packed(model.groups * rank, inputs, device)
        return Call(
            OPERATORS["grouped_output"],
            (o, *weight, model.groups, True),
            floors.product(step.tokens, model.groups * rank, inputs, model.groups, out=1),
            step.tokens,
            lambda rows: (o[rows], *weight, model.groups, True),
        )

    label = f"{model.groups} groups, {inputs} to {rank}"
    memory = model.groups * rank * inputs * 9 + step.tokens * model.heads * 512 * 8
    return _case("grouped_output", model, step, label, memory, make)


def _greedy(model: Model, step: Step) -> Case:
    tokens = min(step.tokens, 512)  # of a prefill only last rows are sampled

    def make(device: torch.device) -> Call:
        logits = torch.randn(tokens, model.vocab, device=device)
        return Call(
            OPERATORS["sample_greedy"],
            (logits,),
            floors.sample_greedy(tokens, model.vocab),
            tokens,
            lambda rows: (logits[rows],),
        )

    label = f"{tokens} rows of {model.vocab}"
    return _case("sample_greedy", model, step, label, tokens * model.vocab * 24, make)


MAKERS: dict[str, Callable[[Model, Step, int], Iterator[Case]]] = {
    "mhc_pre": lambda model, step, _: iter((_mhc("mhc_pre", 24, True, False, model, step),)),
    "mhc_post": lambda model, step, _: iter((_mhc("mhc_post", 24, False, True, model, step),)),
    "mhc_post_pre": lambda model, step, _: iter(
        (_mhc("mhc_post_pre", 24, True, True, model, step),)
    ),
    "mhc_head": lambda model, step, _: iter((_mhc("mhc_head", 4, True, False, model, step),)),
    "rms_norm_quant": lambda model, step, _: _norm(model, step),
    "block_fp8_linear": lambda model, step, _: _linear(model, step),
    "linear_fp32": lambda model, step, _: _linear_fp32(model, step),
    "grouped_output": lambda model, step, _: iter((_grouped(model, step),)),
    "sample_greedy": lambda model, step, _: iter((_greedy(model, step),)),
}
