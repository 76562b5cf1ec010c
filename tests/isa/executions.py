"""What is executed as machine code: calls of every operator that has kernels, in shapes that an
executor on a CPU finishes in seconds, held against the operator's reference.

    python tests/isa/executions.py      # renews the table in docs/kernels.md
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "benchmarks")]

import kernel_cases
import tilelang_launches
import torch

from dsv4_plugin import device
from dsv4_plugin.ops.operator import OPERATORS, Implementation
from dsv4_plugin.runtime import compare
from dsv4_plugin.runtime.cases import MODELS, cases, sizes
from gfx950.banks import BankConflicts
from gfx950.hazards import check_waits
from gfx950.machine import Options
from gfx950.races import Alignment, GlobalRaces, LocalRaces
from gfx950.triton_driver import Executed, executing
from gfx950.wait_states import check_wait_states

LANGUAGES = ("triton", "gluon", *(() if tilelang_launches.missing() else ("tilelang",)))
"""Implementations that are kernels and can be compiled here, by name."""
WATCHED = Options(watches=(LocalRaces, GlobalRaces, Alignment, BankConflicts))
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

    @property
    def bank_conflicts(self) -> list[BankConflicts]:
        """Of each launch that was watched for them."""
        watches = (watch for each in self.launches for watch in each.told.watches)
        return [watch for watch in watches if isinstance(watch, BankConflicts)]


@dataclass(frozen=True)
class Outcome:
    """What is kept of a call: `refused` is why the kernel does not take it."""

    refused: str | None = None
    error: float = 0.0
    limit: float = 0.0
    launches: int = 0
    instructions: int = 0
    """Of all waves."""
    matrix: tuple[str, ...] = ()
    """Mnemonics of matrix instructions."""
    hazards: tuple[str, ...] = ()
    lds_accesses: int = 0
    """As in banks.BankConflicts, like the three below."""
    lds_bytes: int = 0
    lds_phases: int = 0
    lds_conflicts: int = 0


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
        with (
            executing(arch, options, run) as launches,
            tilelang_launches.executing(arch, options, run, launches),
        ):
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


def outcome(case: Case, options: Options) -> Outcome:
    """Runs a call, and looks for hazards on the paths of its kernels."""
    found = execute(case, options)
    if isinstance(found, str):
        return Outcome(refused=found)
    hazards, matrix = list(found.findings), set()
    for program in {each.hsaco: each.program for each in found.launches}.values():
        hazards += check_waits(program) + check_wait_states(program)
        names = {i.name for i in program.instructions.values()}
        matrix |= {name for name in names if name.startswith("v_mfma")}
    lds = found.bank_conflicts
    return Outcome(
        error=found.error,
        limit=found.limit,
        launches=len(found.launches),
        instructions=sum(each.told.instructions for each in found.launches),
        matrix=tuple(sorted(matrix)),
        hazards=tuple(dict.fromkeys(map(str, hazards))),
        lds_accesses=sum(each.accesses for each in lds),
        lds_bytes=sum(each.bytes for each in lds),
        lds_phases=sum(each.phases for each in lds),
        lds_conflicts=sum(each.conflicts for each in lds),
    )


_ROOT = Path(__file__).parents[2]


@functools.cache
def _sources() -> bytes:
    """Digest of everything but the kernels that an outcome depends on."""
    digest = hashlib.sha256()
    for pattern in (
        *("gfx950/*.py", "tests/isa/executions.py", "tests/isa/tilelang_launches.py"),
        "benchmarks/kernel_cases.py",
        *("dsv4_plugin/*.py", "dsv4_plugin/ops/*.py", "dsv4_plugin/runtime/*.py"),
        "dsv4_plugin/cache/*.py",
    ):
        for path in sorted(_ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.digest()


def key(case: Case, options: Options) -> str | None:
    """A name for the outcome of a call: its code objects, grids, options, and all sources that it
    depends on. None for a call that is refused."""
    compiled = compile_only(case)
    if isinstance(compiled, str):
        return None
    watches = [watch.__name__ for watch in options.watches]
    digest = hashlib.sha256(_sources())
    digest.update(f"{case.name} {replace(options, watches=())} {watches}".encode())
    for each in compiled:
        digest.update(each.hsaco + repr(each.grid).encode())
    return digest.hexdigest()[:32]


def table(outcomes: dict[Case, Outcome]) -> list[list[str]]:
    """Rows operator × language: calls, launches, instructions, matrix instructions, bytes of an LDS
    access of a wave, its conflicts as a share of the phases, the largest error of what is allowed,
    hazards."""
    rows = []
    for operator, implementation in kernels():
        mine = [
            found
            for case, found in outcomes.items()
            if (case.operator, case.implementation) == (operator, implementation.name)
            and not found.refused
        ]
        worst = max(mine, key=lambda each: each.error / (each.limit or 1.0))
        matrix = {name.removeprefix("v_mfma_f32_") for each in mine for name in each.matrix}
        matrix = {name.replace("v_mfma_scale_f32_", "scaled ") for name in matrix}
        accesses, octets, phases, more = (
            sum(getattr(each, f"lds_{name}") for each in mine)
            for name in ("accesses", "bytes", "phases", "conflicts")
        )
        cells = (
            f"`{operator}`",
            implementation.name,
            len(mine),
            sum(each.launches for each in mine),
            f"{sum(each.instructions for each in mine):,}",
            ", ".join(sorted(matrix)) or "–",
            f"{octets / accesses:.0f}" if accesses else "–",
            f"{more:,} ({more / phases:.0%})" if accesses else "–",
            f"{worst.error:.1e} of {worst.limit:.0e}" if worst.error else "equal",
            sum(len(each.hazards) for each in mine),
        )
        rows.append([str(cell) for cell in cells])
    return rows


HEADER = [
    *"operator language calls launches instructions products".split(),
    *("bytes an LDS access", "LDS conflicts", "error", "hazards"),
]
MARKER = "<!-- executed on a CPU -->"
DOCUMENT = _ROOT / "docs" / "kernels.md"


def markdown(rows: list[list[str]]) -> str:
    """The table as docs/kernels.md has it."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def documented() -> list[list[str]]:
    """The rows in docs/kernels.md."""
    text = DOCUMENT.read_text().split(MARKER)[1]
    lines = itertools.takewhile(lambda line: line.startswith("|"), text.strip().splitlines())
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in list(lines)[2:]]


def main() -> None:
    """Executes everything and renews the table in docs/kernels.md."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rows = table({case: outcome(case, WATCHED) for case in all_cases()})
    before, after = DOCUMENT.read_text().split(MARKER)
    rest = after.strip().splitlines()
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    DOCUMENT.write_text(f"{before}{MARKER}\n{markdown(rows)}\n" + "\n".join(rest) + "\n")


if __name__ == "__main__":
    main()
