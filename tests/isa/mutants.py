"""Kernels broken on purpose, one instruction at a time: what would find that?

python tests/isa/mutants.py        # every wait, barrier, s_nop and LDS offset of these kernels
"""

from __future__ import annotations

import dataclasses
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[n]) for n in (0, 2)]
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import executions
from executions import Case

from gfx950 import triton_driver
from gfx950.hazards import check_waits
from gfx950.machine import Failed, Options, Program, compiled
from gfx950.program import Instruction
from gfx950.races import GlobalRaces, LocalRaces
from gfx950.scalar import wait_counts
from gfx950.wait_states import check_wait_states

WATCHED = Options(watches=(LocalRaces, GlobalRaces), limit=20_000_000)
KINDS = ("wait for vector memory", "wait for LDS", "barrier", "s_nop", "LDS offset")
CASES = (
    "sparse_mla/gluon/decode 2 x 300, c4, 16 heads, 192 slots",
    "topk_select/triton/c4, 15 rows",
    "qk_norm_rope_store/triton/window, 3 rows",
    "indexer_logits/triton/c4, 3 rows",
)
"""Between them: LDS exchanged between waves, transposed reads, pipelined loads, scans, products."""


def kind(i: Instruction, before: Instruction | None = None) -> str | None:
    """What breaking an instruction takes away; None where it is not broken, as an s_nop between two
    memory accesses: XNACK wants it, which this package does not check."""
    if i.name == "s_nop" and before and before.form.startswith(("GLOBAL", "MUBUF")):
        return KINDS[3] if "store" in before.name else None
    if i.name == "s_waitcnt":
        return KINDS[0] if wait_counts(i)[0] < 63 else KINDS[1]
    if i.name.startswith(("ds_write", "ds_read")):
        return KINDS[4]
    return {"s_barrier": KINDS[2], "s_nop": KINDS[3]}.get(i.name)


class _Moved(Instruction):
    """An LDS access 16 bytes further on (or back, where its offset is large)."""

    def get(self, field: str) -> int:
        value = super().get(field)
        two = "read2" in self.name or "write2" in self.name
        step = 1 if two else 16
        return (value + step if value < 200 else value - step) if field == "offset0" else value


def broken(program: Program, address: int) -> Program:
    """`program` without the instruction at `address`, an LDS access with another offset."""
    i = program.instructions[address]
    mutant = Program.__new__(Program)
    mutant.kernel, mutant.instructions = program.kernel, dict(program.instructions)
    mutant.code = dict(program.code)
    at = max(each for each in program.code if each <= address)
    code = program.code[at]
    if i.name == "s_barrier":
        block = dataclasses.replace(code.block, last=None)
        mutant.code[at] = dataclasses.replace(code, block=block)
        return mutant
    n = [each.address for each in code.block.body].index(address)
    body, run = list(code.block.body), list(code.run)
    if kind(i) == KINDS[4]:
        body[n] = _Moved(*(getattr(i, each.name) for each in dataclasses.fields(i)))
        run[n] = compiled(body[n], program.kernel)
        mutant.instructions[address] = body[n]
    else:
        del body[n], run[n], mutant.instructions[address]
    block = dataclasses.replace(code.block, body=tuple(body))
    mutant.code[at] = dataclasses.replace(code, block=block, run=run)
    return mutant


def found_by(case: Case, key: tuple[bytes, str], mutant: Program) -> str:
    """ "the program", "the watches", "the result" or "nobody"."""
    if check_waits(mutant) or check_wait_states(mutant):
        return "the program"
    original = triton_driver._programs[key]
    triton_driver._programs[key] = mutant
    try:
        result = executions.execute(case, WATCHED)
    except Failed:
        return "the watches"
    finally:
        triton_driver._programs[key] = original
    if result.findings:
        return "the watches"
    return "nobody" if result.passed else "the result"


def mutants(
    name: str, wanted: Callable[[str], bool], most: int | None = None
) -> Iterator[tuple[str, str, Instruction, str]]:
    """(kernel, kind, instruction, who finds it) for the instructions of a case's kernels that a
    launch executes; `most` of each kind, chosen by chance, or all."""
    case = next(each for each in executions.all_cases() if each.name == name)
    sound = executions.execute(case, WATCHED)
    assert sound.passed and not sound.findings
    for key in dict.fromkeys((each.hsaco, each.kernel) for each in sound.launches):
        program = triton_driver._programs[key]
        first = program.entries()[-1]
        of = [i for a, i in program.instructions.items() if a >= first]
        kinds = {i.address: kind(i, before) for before, i in zip([None, *of], of)}
        for each in filter(wanted, KINDS):
            some = [i for i in of if kinds[i.address] == each]
            if most is not None:
                some = random.Random(0).sample(some, min(most, len(some)))
            for i in some:
                yield key[1], each, i, found_by(case, key, broken(program, i.address))


def main() -> None:
    """Prints who finds what, and what nobody finds."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    counts: dict[str, Counter] = {each: Counter() for each in KINDS}
    most = int(sys.argv[1]) if len(sys.argv) > 1 else None
    for name in CASES:
        for kernel, each, i, who in mutants(name, lambda kind: True, most):
            counts[each][who] += 1
            if who == "nobody":
                print(f"nobody: {kernel} {re.sub(' +', ' ', str(i))}", flush=True)
        print(name, counts, flush=True)
    for each, by in counts.items():
        print(f"{each}: {dict(by)}, {1 - by['nobody'] / max(by.total(), 1):.1%} found")


if __name__ == "__main__":
    main()
