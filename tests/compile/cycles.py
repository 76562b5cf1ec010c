"""Static cost of AMD code by llvm-mca, where it is installed (Debian's llvm-22; LLVM_MCA names
another).

llvm-mca models one wave, straight-line code and a fixed memory latency. Its unit is the 4 clocks
that a wave64 vector instruction takes. Compare kernels in the same unit by it; it is never a time.
Products of FP8 are priced by us (`chips.unpriced_cycles`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache

from chips import Chip, unpriced_cycles

_TIMEOUT = 30
_MEMORY = re.compile(r"(global|buffer|flat|scratch)_")
_SWAP = re.compile(r"^v_(?:permlane(?:16|32)_)?swap_b32(?:_e32|_e64)? (v\d+), (v\d+).*")


@cache
def tool() -> str | None:
    """Path of llvm-mca 22 or the one LLVM_MCA names; None when there is none. Older ones do not
    know gfx950."""
    return shutil.which(os.environ.get("LLVM_MCA", "llvm-mca-22"))


@cache
def tool_version() -> str | None:
    """Version of llvm-mca, None without it."""
    if tool() is None:
        return None
    text = subprocess.run([tool(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"version (\S+)", text)[1]


def cycles(body: list[str], chip: Chip) -> int | None:
    """llvm-mca cycles of one wave's single pass through `body`; None without llvm-mca or when it
    does not end."""
    if tool() is None:
        return None
    # llvm-mca 22 never returns on an instruction with two vector results between matrix
    # instructions: two moves.
    text = "\n".join(
        _SWAP.sub(r"v_mov_b32_e32 \1, \2\nv_mov_b32_e32 \2, \1", line)
        for line in body
        if not line.startswith(("s_cbranch", "s_branch", "s_endpgm", "s_setpc"))
    )
    command = [
        tool(),
        "-mtriple=amdgcn-amd-amdhsa",
        f"-mcpu={chip.arch}",
        "-iterations=1",
        "-instruction-info=0",
        "-resource-pressure=0",
        "-",
    ]
    try:
        run = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return None
    found = re.search(r"Total Cycles:\s+(\d+)", run.stdout)
    return int(found[1]) + sum(map(unpriced_cycles, body)) if found else None


def issue_cycles(body: list[str], chip: Chip) -> int | None:
    """The same with global memory free: each access keeps its issue slot, waits and barriers go.
    This is the part that more waves cannot hide."""
    free = [
        "s_nop 0" if _MEMORY.match(line) else line
        for line in body
        if not line.startswith(("s_wait", "s_barrier"))
    ]
    return cycles(free, chip)
