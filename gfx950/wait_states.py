"""Wait states that software must leave between instructions, because the hardware does not check:
found over all paths of a program (CDNA3 and CDNA4 ISA, "Manually Inserted Wait States"; the numbers
for matrix instructions are LLVM's, GCNHazardRecognizer).

Not checked: the "soft clauses" of accesses that XNACK repeats, which LLVM parts by s_nop too."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from . import registers
from .hazards import Finding, walk
from .machine import Program
from .program import EXEC, M0, VCC, Instruction
from .registers import SCALAR

_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)_f(16|32|64)$")
_FAR = 24
"""Wait states after which nothing is a hazard any more."""
_PAIRS = {SCALAR + VCC, SCALAR + VCC + 1}
_EXEC = {SCALAR + EXEC, SCALAR + EXEC + 1}


def passes(i: Instruction) -> int:
    """Passes of 4 cycles of a matrix instruction of gfx950."""
    rows, depth, kind = re.search(r"_f32_(\d+)x\d+x(\d+)_?(\w+)", i.name).groups()
    macs = int(rows) ** 2 * int(depth)
    if kind == "f8f6f4":  # twice as long where an operand has 8 bits
        eight = i.get("cbsz") < 2 or i.get("blgp") < 2
        return macs // (4096 if eight else 8192)
    rate = {"f32": 128, "xf32": 512}.get(kind, 2048)
    return max(macs // rate, 4)


@dataclass(frozen=True)
class _Write:
    """How a register was last written."""

    by: str
    """ "vector", "scalar", "transcendental", "part" (of a register) or "matrix"."""
    passes: int = 0
    span: frozenset[int] = frozenset()
    """All that a matrix instruction wrote."""
    more: int = 0
    """Wait states of its result beyond its passes."""


_TAKEN = 1 << 16
"""Added to a register that an instruction takes later than it is issued: the data of a store of
more than 64 bits, the C of a matrix instruction."""


@dataclass
class _Recent:
    """Registers written not long ago: how, and at least how many wait states ago."""

    writes: dict[int, tuple[_Write, int]] = field(default_factory=dict)

    def copy(self) -> _Recent:
        return _Recent(dict(self.writes))

    def merge(self, other: _Recent) -> bool:
        changed = False
        for register, (how, age) in other.writes.items():
            mine = self.writes.get(register)
            if mine is None or age - how.passes < mine[1] - mine[0].passes:
                self.writes[register] = (how, age)
                changed = True
        return changed

    def go_on(self, states: int) -> None:
        self.writes = {r: (h, a + states) for r, (h, a) in self.writes.items() if a + states < _FAR}


@dataclass(frozen=True)
class _Use:
    """An instruction as the rules see it."""

    i: Instruction
    read: set[int]
    written: set[int]
    factors: set[int]
    """A and B of a matrix instruction."""
    terms: set[int]
    """Its C."""
    accumulators_at: int

    @property
    def vector(self) -> bool:
        return self.i.name.startswith("v_")

    @property
    def matrix(self) -> bool:
        return self.i.name.startswith("v_mfma")

    @property
    def memory(self) -> bool:
        return self.i.counter in ("vector", "local")


def _use(i: Instruction, accumulators_at: int) -> _Use:
    read, written = registers.registers(i, accumulators_at)
    factors, terms = set(), set()
    if i.name.startswith("v_mfma"):
        for operand in ("src0", "src1"):
            factors |= registers.operand(i, operand, accumulators_at)
        terms = registers.operand(i, "src2", accumulators_at)
    return _Use(i, read, written, factors, terms, accumulators_at)


def _after_matrix(use: _Use, register: int, how: _Write) -> int:
    """Wait states that a use of a matrix instruction's result needs; as the C of another, all of
    it, none."""
    if use.matrix and register not in use.factors:
        overlaps = register in use.terms and use.terms != how.span
        return how.passes + how.more - 2 if overlaps else 0
    return how.passes + how.more if use.vector or use.memory else 0


def _needed(use: _Use, register: int, how: _Write) -> int:
    """Wait states between a write of `register` and this use of it."""
    name, form = use.i.name, use.i.form
    lane = re.match(r"v_(readlane|writelane)", name)
    reads = register in use.read
    if how.by == "scalar":  # by a vector instruction
        if use.memory and reads:
            return 5
        if lane and register in registers.operand(use.i, "src1", 0):
            return 4
        if name.startswith("v_div_fmas") and register in _PAIRS:
            return 4
        return 2 if use.vector and reads else 0
    if how.by == "exec":
        return 5 if "DPP" in form else 4 if re.match(r"v_(read|write)(first)?lane", name) else 0
    if how.by == "m0":
        return 1 if reads and "lds" in name or use.i.get("lds") else 0
    if not reads:
        return 0
    if "DPP" in form or use.matrix or name.startswith("v_permlane"):
        return 2
    if re.match(r"v_read(first)?lane", name):
        return 1
    transforms = how.by == "transcendental" and not _TRANSCENDENTAL.match(name)
    return 1 if use.vector and (transforms or how.by == "part") else 0


def _written_as(use: _Use, register: int) -> _Write | None:
    """How this instruction writes a register, None where nothing has to wait for it."""
    i = use.i
    if use.matrix:
        more = 2 if i.name.endswith("f32") else 4 if passes(i) in (4, 8) else 3
        return _Write("matrix", passes(i), frozenset(use.written), more)
    if not use.vector:
        return _Write("m0") if register == SCALAR + M0 else None
    if register >= SCALAR:
        return _Write("exec" if register in _EXEC else "scalar")
    if _TRANSCENDENTAL.match(i.name):
        return _Write("transcendental")
    part = "SDWA" in i.form and i.get("dst_sel") != 6 or i.has("opsel") and i.bit("opsel", 3)
    return _Write("part" if part else "vector")


def _remember(state: _Recent, use: _Use) -> None:
    """Carries a state over an instruction. A wait state is an instruction, or each count of
    s_nop."""
    i = use.i
    state.go_on(i.get("simm16") + 1 if i.name == "s_nop" else 1)
    for register in use.written:
        how = _written_as(use, register)
        state.writes.pop(register, None)
        if how:
            state.writes[register] = (how, 0)
    data = "vdata" if i.has("vdata") else "data"
    if i.counter == "vector" and "store" in i.name and i.operands[data] > 2:
        stored = registers.operand(i, data, use.accumulators_at)
        state.writes |= {register + _TAKEN: (_Write("store", 2), 0) for register in stored}
    if use.matrix:
        taken = _Write("matrix", passes(i) - 1)
        state.writes |= {register + _TAKEN: (taken, 0) for register in use.terms}


def check_wait_states(program: Program) -> list[Finding]:
    """Uses that come too soon after a write, on some path."""
    kernel, found = program.kernel, {}
    uses = {a: _use(i, kernel.accumulators_at) for a, i in program.instructions.items()}

    def report(i: Instruction, how: object, what: str) -> None:
        finding = Finding("wait state", what, str(i), kernel.line(i.address))
        found.setdefault((i.address, how), finding)

    def step(state: _Recent, i: Instruction) -> None:
        use = uses[i.address]
        for register in use.read | use.written if state.writes else ():
            how, age = state.writes.get(register, (None, 99))
            if how:
                needs = (_after_matrix if how.by == "matrix" else _needed)(use, register, how)
                if age < needs:
                    what = f"{registers.name(register)} is used {age} wait states after a {how.by}"
                    report(i, how, f"{what} write, {needs} are needed")
        for register in use.written if use.vector and not use.matrix else ():
            how, age = state.writes.get(register + _TAKEN, (None, 99))
            if how and age < how.passes:
                what = (
                    f"{registers.name(register)} is overwritten {age} wait states after a {how.by}"
                )
                report(i, "taken", f"{what} instruction that reads it, {how.passes} are needed")
        _remember(state, use)

    walk(program, _Recent(), step)
    return list(found.values())
