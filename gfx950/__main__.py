"""python -m gfx950 FILE.hsaco ...: what is in a code object, and the hazards on its paths."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from .code_object import ARCHS, Kernel, Unreadable, load
from .hazards import Finding, check_waits
from .machine import Program, Unknown, compiled
from .program import Instruction, Undecodable, decode
from .wait_states import check_wait_states

CLASSES = (
    ("matrix", ("v_mfma",)),
    ("conversion", ("v_cvt",)),
    ("lane exchange", ("v_readlane", "v_readfirst", "v_writelane", "v_permlane", "ds_b", "ds_p")),
    ("accumulation register move", ("v_accvgpr",)),
    ("vector", ("v_",)),
    ("LDS", ("ds_",)),
    ("load into LDS", ("global_load_lds",)),
    ("atomic", ("global_atomic", "buffer_atomic")),
    ("load", ("global_load", "buffer_load", "scratch_load")),
    ("store", ("global_store", "buffer_store", "scratch_store")),
    ("scalar load", ("s_load", "s_buffer_load")),
    ("branch", ("s_branch", "s_cbranch", "s_endpgm")),
    ("wait, barrier, nop", ("s_waitcnt", "s_barrier", "s_nop")),
    ("scalar", ("s_",)),
)


def class_of(i: Instruction) -> str:
    """Which of CLASSES an instruction belongs to: the first whose name it has."""
    if i.form.startswith("MUBUF") and i.get("lds"):
        return "load into LDS"
    return next((name for name, begins in CLASSES if i.name.startswith(begins)), "cache control")


def describe(kernel: Kernel) -> list[str]:
    """What the descriptor and the metadata say."""
    about = kernel.metadata
    return [
        f"{kernel.name} for {kernel.arch}",
        f"  {about.get('.vgpr_count', '?')} vector registers, of them {about.get('.agpr_count', 0)}"
        f" accumulation, {about.get('.sgpr_count', '?')} scalar;"
        f" spilled {about.get('.vgpr_spill_count', 0)} and {about.get('.sgpr_spill_count', 0)}",
        f"  {kernel.lds} bytes of static LDS, {kernel.scratch} of scratch a lane, workgroups of at"
        f" most {about.get('.max_flat_workgroup_size', '?')} threads",
        f"  {len(kernel.arguments)} arguments in {kernel.kernarg_size} bytes,"
        f" {kernel.preload} words preloaded",
    ]


def inspect(kernel: Kernel) -> tuple[list[str], list[Finding]]:
    """(lines about a kernel, its hazards). Raises Unreadable."""
    unknown = set()
    try:
        instructions = decode(kernel)
    except Undecodable as error:
        archs = " or ".join(ARCHS)
        raise Unreadable(f"kernel {kernel.name}: {error}; compile it again, for {archs}") from error
    for i in (i for i in instructions.values() if i.target is None):
        try:
            compiled(i, kernel)
        except Unknown:
            unknown.add(i.name)
    if unknown:
        raise Unreadable(
            f"kernel {kernel.name} has instructions that gfx950/ does not implement:"
            f" {', '.join(sorted(unknown))}; add each to the file of its class (gfx950/README.md)"
        )
    program = Program(kernel)
    findings = check_waits(program) + check_wait_states(program)
    classes = Counter(class_of(i) for i in instructions.values())
    lines = [*describe(kernel), f"  {len(instructions)} instructions"]
    lines += [f"    {classes[name]:6d} {name}" for name, _ in CLASSES if classes[name]]
    return [*lines, f"  {len(findings)} hazards"], findings


def read(name: str) -> dict[str, Kernel]:
    """The kernels in a file. Raises Unreadable."""
    try:
        return load(Path(name).read_bytes())
    except OSError as error:
        raise Unreadable(f"{error.strerror}; give a .hsaco, as in ~/.triton/cache") from error


def main() -> int:
    """The exit status: 1 where there are hazards, 2 where a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m gfx950", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.hsaco")
    bad = 0
    for name in parser.parse_args().files:
        try:
            for kernel in read(name).values():
                lines, findings = inspect(kernel)
                print(*lines, *(f"    {found}" for found in findings), sep="\n")
                bad += len(findings)
        except Unreadable as error:
            print(f"gfx950: error: {name}: {error}", file=sys.stderr)
            return 2
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
