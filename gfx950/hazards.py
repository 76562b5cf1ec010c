"""Hazards that are in a program, whatever it is run on: found over all its paths, without a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from . import registers
from .machine import Program
from .program import Instruction
from .scalar import wait_counts


@dataclass(frozen=True)
class Finding:
    """Something wrong at an instruction."""

    kind: str
    """"wait", "wait state", "local race", "global race", "uninitialised" or "alignment"."""
    what: str
    where: str
    """The instruction."""
    line: str
    """ "file:line" of its source."""

    def __str__(self) -> str:
        return f"{self.line}: {self.kind}: {self.what}: {self.where}"


State = TypeVar("State")


def walk(program: Program, start: State, step: Callable[[State, Instruction], None]) -> None:
    """Carries a state with `copy` and `merge` (whether that changed it) along every path until
    nothing changes."""
    before = {address: start.copy() for address in program.entries()}
    todo = deque(before)
    while todo:
        address = todo.popleft()
        state, block = before[address].copy(), program.code[address].block
        for i in block.instructions:
            step(state, i)
        for each in block.following:
            if each not in before:
                before[each] = state.copy()
                todo.append(each)
            elif before[each].merge(state) and each not in todo:
                todo.append(each)


@dataclass
class _Pending:
    """Registers whose loads may be under way: (counter, how many younger accesses of that counter
    there are at least)."""

    registers: dict[int, tuple[str, int]] = field(default_factory=dict)
    scalar_loads: bool = False

    def copy(self) -> _Pending:
        return _Pending(dict(self.registers), self.scalar_loads)

    def merge(self, other: _Pending) -> bool:
        changed = other.scalar_loads and not self.scalar_loads
        self.scalar_loads |= other.scalar_loads
        for register, (kind, age) in other.registers.items():
            mine = self.registers.get(register)
            if mine is None or age < mine[1] or mine[0] != kind and kind == "scalar":
                self.registers[register] = (kind, age)
                changed = True
        return changed

    def wait(self, vector: int, local: int) -> None:
        """Drops what has arrived. A scalar load waits for 0, and while one is under way no other
        number says which LDS accesses are done."""
        most = {"vector": vector, "scalar": local and 1 << 30, "local": local}
        if local and self.scalar_loads:
            most["local"] = 1 << 30
        self.registers = {r: (k, age) for r, (k, age) in self.registers.items() if age < most[k]}
        self.scalar_loads &= local > 0

    def issue(self, kind: str, written: set[int]) -> None:
        self.registers = {r: (k, age + (k == kind)) for r, (k, age) in self.registers.items()}
        self.scalar_loads |= kind == "scalar"
        self.registers |= dict.fromkeys(written, (kind, 0))


def check_waits(program: Program) -> list[Finding]:
    """Registers that are read or overwritten, on some path, while a load into them may be under
    way (CDNA4 ISA, "Data Dependency Resolution")."""
    kernel, found = program.kernel, {}
    used = {
        address: registers.registers(i, kernel.accumulators_at)
        for address, i in program.instructions.items()
    }

    def step(state: _Pending, i: Instruction) -> None:
        if i.name == "s_waitcnt":
            state.wait(*wait_counts(i))
            return
        read, written = used[i.address]
        kind = i.counter
        for register in read | written if state.registers else ():
            pending = state.registers.get(register)
            how = "read" if register in read else "overwritten"
            # Loads of one kind write in order, so one may follow another into the same register.
            follows = how == "overwritten" and kind == (pending or [0])[0] and kind != "scalar"
            if pending and not follows:
                what = f"{registers.name(register)} is {how} before its {pending[0]} load arrived"
                key = i.address, how, pending[0]
                found.setdefault(key, Finding("wait", what, str(i), kernel.line(i.address)))
        if kind:
            state.issue(kind, written)

    walk(program, _Pending(), step)
    return list(found.values())
