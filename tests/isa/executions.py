"""What is executed as machine code: calls of every operator that has kernels, in shapes that an
executor on a CPU finishes in seconds, held against the operator's reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import kernel_cases
import torch

from dsv4_plugin import device
from dsv4_plugin.ops.operator import OPERATORS, Implementation
from dsv4_plugin.runtime import compare
from dsv4_plugin.runtime.cases import MODELS, cases, sizes
from gfx950.machine import Options
from gfx950.triton_driver import Executed, executing

LANGUAGES = ("triton", "gluon")
"""Implementations that are kernels, by name."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One call of an operator."""

    operator: str
    implementation: str
    label: str
    arguments: Callable[[], tuple] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.implementation}/{self.label}"


@dataclass(frozen=True)
class Execution:
    """A call that ran: how far it was from the reference, how far it may be, and its launches."""

    case: Case
    error: float
    limit: float
    launches: list[Executed]

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    @property
    def findings(self) -> list:
        """What the watches of all launches found."""
        return [found for each in self.launches for found in each.told.findings]


def kernels() -> list[tuple[str, Implementation]]:
    """Every implementation of every operator that is a kernel."""
    return [
        (name, each)
        for name, operator in OPERATORS.items()
        for each in operator.implementations.values()
        if each.name in LANGUAGES
    ]


def _calls(operator: str) -> Iterator[tuple[str, Callable[[], tuple]]]:
    """(label, function that makes the arguments) of the calls of an operator: those of `dsv4
    verify` (both models give a CPU the same shapes), and the released ones for what depends on the
    number of heads or entries."""
    for size in sizes(MODELS[0], _CPU, quick=True):
        for case in cases(operator, size, _CPU, seed=1) if size.rows else ():
            yield case.label.removeprefix(f"{size.name} "), case.arguments
    decode = kernel_cases.Step("decode", 2, 300)
    for model in ("pro-tp8", "flash", "pro-dp8"):
        shape = kernel_cases.MODELS[model]
        if operator == "sparse_mla":
            for case in kernel_cases._MAKERS[operator](shape, decode, 64):
                yield case.label, lambda case=case: case.make(_CPU).arguments
    if operator in ("indexer_logits", "rope_hadamard_quant"):
        for case in kernel_cases._MAKERS[operator](kernel_cases.MODELS["pro-tp8"], decode, 64):
            yield case.label, lambda case=case: case.make(_CPU).arguments
    if operator == "topk_select":  # more entries than a program selects from at once
        long = kernel_cases.Step("decode", 1, 1 << 17)
        for case in kernel_cases._MAKERS[operator](kernel_cases.MODELS["pro-tp8"], long, 1024):
            yield case.label, lambda case=case: case.make(_CPU).arguments


def all_cases() -> list[Case]:
    """Every call of every kernel."""
    return [
        Case(operator, implementation.name, label, arguments)
        for operator, implementation in kernels()
        for label, arguments in _calls(operator)
    ]


@contextmanager
def chip(arch: str, options: Options | None = None, run: bool = True) -> Iterator[list[Executed]]:
    """Within it this process believes in a GPU of `arch`, which is gfx950/."""
    before = device.arch
    device.arch = lambda: arch
    try:
        with executing(arch, options, run) as launches:
            yield launches
    finally:
        device.arch = before


def _refused(implementation: Implementation, arguments: tuple, arch: str) -> str | None:
    """Why a kernel does not take a call."""
    if implementation.archs and not arch.startswith(implementation.archs):
        return f"{arch} is not one of {', '.join(implementation.archs)}"
    return implementation.requires(*arguments) if implementation.requires else None


def execute(case: Case, options: Options | None = None, arch: str = "gfx950") -> Execution | str:
    """Runs a call and compares it with the reference; the reason where the kernel does not take
    it."""
    torch.manual_seed(0)
    operator = OPERATORS[case.operator]
    implementation = operator.implementations[case.implementation]
    arguments = case.arguments()
    with chip(arch, options) as launches:
        if reason := _refused(implementation, arguments, arch):
            return reason
        _, errors = compare.errors(operator, implementation.load(), arguments, {})
    limit = compare.tolerance(case.operator, arguments[0].dtype).limit
    return Execution(case, max(errors.values(), default=0.0), limit, launches)


def compile_only(case: Case, arch: str = "gfx950") -> list[Executed] | str:
    """The launches of a call, compiled and not run; the reason where the kernel does not take
    it."""
    implementation = OPERATORS[case.operator].implementations[case.implementation]
    arguments = case.arguments()
    with chip(arch, run=False) as launches:
        if reason := _refused(implementation, arguments, arch):
            return reason
        implementation.load()(*arguments)
    return launches
