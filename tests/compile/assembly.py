"""Reading compiled kernels: registers, spills, matrix instructions, the hot loop."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from chips import SIMDS, VECTOR_REGISTERS, WAVES_PER_SIMD, Chip, matrix_instruction

_LABEL = re.compile(r"^(\.?L[\w$]+):")
_BRANCH = re.compile(r"^s_c?branch\w*\s+(\S+)")


def _code(assembly: str) -> list[tuple[str | None, str]]:
    """(label, None) or (None, instruction) lines of the first function, in layout order, without
    comments."""
    lines: list[tuple[str | None, str]] = []
    for line in assembly.split(".Lfunc_end0")[0].splitlines():
        if label := _LABEL.match(line):
            lines.append((label[1], ""))
            continue
        text = line.split("//")[0].split(";")[0].strip()
        if text and not text.startswith(".") and not text.endswith(":"):
            lines.append((None, text))
    return lines


def instructions(assembly: str) -> list[str]:
    """Instructions of the kernel in layout order."""
    return [text for label, text in _code(assembly) if label is None]


def matrix_counts(body: list[str]) -> Counter[str]:
    """Matrix instructions by mnemonic."""
    names = (text.split()[0] for text in body)
    return Counter(re.sub(r"_e64$", "", name) for name in names if matrix_instruction(name))


def matrix_macs(body: list[str]) -> int:
    """Multiply-adds of one wave's pass through `body`."""
    return sum(matrix_instruction(name).macs * count for name, count in matrix_counts(body).items())


def _reached(lines: list[tuple[str | None, str]], at: dict[str, int], start: int) -> set[int]:
    """The lines that can follow line `start`; `at` has the lines of labels."""
    found, ahead = set(), [start]
    while ahead:
        i = ahead.pop()
        if i in found or i >= len(lines):
            continue
        found.add(i)
        _, text = lines[i]
        name, branch = text.split()[0] if text else "", _BRANCH.match(text)
        if branch and branch[1] in at:
            ahead.append(at[branch[1]])
        if name not in ("s_branch", "s_endpgm"):
            ahead.append(i + 1)
    return found


def hot_loop(assembly: str) -> list[str] | None:
    """Instructions of the innermost loop with the most matrix work, or the longest innermost loop;
    None without loops.

    A loop is what lies between a label and the last branch back to it that the label leads to. (A
    block that runs once, laid out of line, jumps back as well: nothing leads from there to it.)
    """
    lines = _code(assembly)
    at = {label: i for i, (label, _) in enumerate(lines) if label}
    spans: dict[int, int] = {}
    for i, (_, text) in enumerate(lines):
        branch = _BRANCH.match(text)
        if branch and at.get(branch[1], i) < i and i in _reached(lines, at, at[branch[1]]):
            spans[at[branch[1]]] = i
    bodies = {
        span: [text for label, text in lines[span[0] : span[1] + 1] if label is None]
        for span in spans.items()
    }
    working = {span: body for span, body in bodies.items() if matrix_counts(body)} or bodies
    inner = [
        body
        for (start, end), body in working.items()
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in working)
    ]
    return max(inner, key=lambda body: (matrix_macs(body), len(body)), default=None)


def amd_resources(compiled: Any, chip: Chip) -> dict[str, Any]:
    """Registers, spills, LDS and occupancy of a compiled AMD kernel, and its matrix
    instructions."""
    assembly = compiled.asm["amdgcn"]

    def entry(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[-1])

    warps, lds, vgpr = compiled.metadata.num_warps, compiled.metadata.shared, entry("vgpr_count")
    by_registers = (
        min(WAVES_PER_SIMD, VECTOR_REGISTERS // (8 * max(1, math.ceil(vgpr / 8)))) * SIMDS // warps
    )
    grains = math.ceil(lds / chip.local_memory_grain) * chip.local_memory_grain
    by_lds = chip.local_memory // grains if grains else WAVES_PER_SIMD * SIMDS
    workgroups = min(by_registers, by_lds, WAVES_PER_SIMD * SIMDS // warps)
    body = instructions(assembly)
    return {
        "num_warps": warps,
        "num_stages": compiled.metadata.num_stages,
        "vgpr": vgpr,
        "agpr": entry("agpr_count"),
        "sgpr": entry("sgpr_count"),
        "spills": entry("vgpr_spill_count") + entry("sgpr_spill_count"),
        "scratch": entry("private_segment_fixed_size"),
        "lds": lds,
        "wg_per_cu": workgroups,
        "occ": min(WAVES_PER_SIMD, workgroups * warps / SIMDS),
        "instructions": len(body),
        "mfma": dict(sorted(matrix_counts(body).items())),
    }


def cuobjdump(compiled: Any, what: str) -> str:
    """What Triton's cuobjdump says of a compiled NVIDIA kernel: "-res-usage" or "-sass"."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [tools / "cuobjdump", what, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_occupancy(registers: int, shared: int, warps: int, chip: Chip) -> int:
    """Workgroups that an SM of compute capability 9 holds: 64 warps, 64 K registers given to a warp
    by 256, 32 workgroups."""
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256 * warps)
    by_shared = chip.shared_per_unit // (shared + 1024)
    return min(64 // warps, by_registers, by_shared, 32)


def nvidia_resources(compiled: Any, chip: Chip) -> dict[str, Any]:
    """Registers, spills, shared memory, occupancy and tensor-core instructions of a compiled NVIDIA
    kernel."""
    ptx = compiled.asm["ptx"]
    usage = cuobjdump(compiled, "-res-usage")

    def entry(key: str) -> int:
        return int(re.findall(rf"{key}:(\d+)", usage)[-1])

    warps = compiled.metadata.num_warps
    workgroups = nvidia_occupancy(entry("REG"), compiled.metadata.shared, warps, chip)
    products = re.findall(r"\b(wgmma\.mma_async\.\S+|mma\.sync\.\S+?)[\s{]", ptx)
    return {
        "num_warps": compiled.metadata.num_warps,
        "num_stages": compiled.metadata.num_stages,
        "registers": entry("REG"),
        "spills": entry("LOCAL"),
        "scratch": entry("STACK"),
        "lds": compiled.metadata.shared,
        "wg_per_cu": workgroups,
        "mfma": dict(
            sorted(
                Counter(
                    ".".join(name.split(".")[:1] + name.split(".")[-4:]) for name in products
                ).items()
            )
        ),
    }
