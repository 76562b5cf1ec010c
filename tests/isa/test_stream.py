"""Two decoders on the stream of every kernel: tinygrad's tables, and the text from which LLVM
encoded it."""

from __future__ import annotations

import re

import executions
import pytest

from gfx950 import registers

_REGISTER = re.compile(r"(?<![\w.])([vsa])(?:\[(\d+):(\d+)\]|(\d+)\b)")


def text_of(assembly: str) -> list[str]:
    """Instructions of the first function."""
    lines = (line.split(";")[0].strip() for line in assembly.split(".Lfunc_end0")[0].splitlines())
    return [line for line in lines if line and not line.startswith(".") and line[-1] != ":"]


def named(text: str, accumulators_at: int) -> set[int]:
    """Registers in the text of an instruction."""
    first = {"v": 0, "a": accumulators_at, "s": registers.SCALAR}
    found = set()
    for file, low, high, one in _REGISTER.findall(text):
        span = range(int(low), int(high) + 1) if low else [int(one)]
        found |= {first[file] + n for n in span}
    return found


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(each, marks=pytest.mark.thorough if each.implementation == "tilelang" else ())
        for each in executions.all_cases()
    ],
    ids=lambda case: case.name,
)  # one compiled kernel may serve several cases: it is compared again, in milliseconds
def test_decoders_agree(case):
    """Every instruction has the same name, and reads or writes the registers that its text names
    and no others."""
    compiled = executions.compile_only(case)
    if isinstance(compiled, str):
        pytest.skip(compiled)
    assert compiled
    for each in compiled:
        ran = each.program
        lines, at = text_of(each.compiled.asm["amdgcn"]), ran.kernel.accumulators_at
        decoded = iter(ran.instructions.values())
        for line in lines:
            i = next(decoded)
            while i.name == "s_nop" and not line.startswith("s_nop"):
                i = next(decoded)  # fills up to an aligned loop, which the text says otherwise
            name = re.sub(r"_(e32|e64|dpp|sdwa)$", "", line.split()[0])
            assert name in (i.name, f"{i.name}_b32"), line  # v_accvgpr_read(_b32)
            read, written = registers.registers(i, at)
            special = registers.SCALAR + 104
            assert {r for r in read | written if r < special} == named(line, at), line
        assert next(decoded, None) is None
