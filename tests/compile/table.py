"""The compile table: one row a kernel, kept in golden/<operator>.json and compared with what
compiles today."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import triton
from assembly import (
    amd_resources,
    cuobjdump,
    hot_loop,
    instructions,
    matrix_counts,
    matrix_macs,
    nvidia_resources,
)
from chips import CHIPS, LDS_BYTES_A_CLOCK, Chip
from cycles import cycles, issue_cycles, tool_version
from memory import (
    amd_bytes_in_flight,
    amd_local_bytes,
    sass,
    sass_bytes_in_flight,
    sass_hot_loop,
    sass_local_bytes,
    sass_macs,
)
from pretend import Launch, pretend
from registry import Case, Units, operators

GOLDEN = Path(__file__).parent / "golden"
CYCLE_COLUMNS = (
    "mca_cycles",
    "mca_issue_cycles",
    "mca_outside_cycles",
    "simd_issue_cycles_per_unit",
)
"""Columns that exist only where llvm-mca is installed."""
BEST_MACS = {"16-bit": 2048, "8-bit": 4096, "4-bit": 8192}
"""Multiply-adds of a gfx950 SIMD in 4 clocks, by operand width."""


COLUMNS = 2
"""Counts up when a column is added or priced anew: a table kept with fewer is compared in what it
has."""


def _outside(everything: list[str], loop: list[str]) -> list[str]:
    """What runs once: the kernel without its hot loop. Other loops count once."""
    return [] if len(loop) == len(everything) else _without(everything, loop)


def _without(everything: list[str], loop: list[str]) -> list[str]:
    at = next(i for i in range(len(everything)) if everything[i : i + len(loop)] == loop)
    return everything[:at] + everything[at + len(loop) :]


def _memory(local: int, flying: int, workgroups: int, warps: int) -> dict[str, int]:
    return {
        "lds_bytes_per_pass": local * warps,
        "bytes_in_flight_per_cu": flying * warps * workgroups,
    }


def _nvidia_loop(launch: Launch, row: dict[str, Any], units: Units | None) -> dict[str, Any]:
    code = sass(cuobjdump(launch.compiled, "-sass"))
    body, warps = sass_hot_loop(code), launch.compiled.metadata.num_warps
    found: dict[str, Any] = {"in_loop": body is not None, "instructions": len(code)}
    body = body or [line for _, line in code]
    found["loop_instructions"] = len(body)
    found |= _memory(sass_local_bytes(body), sass_bytes_in_flight(body), row["wg_per_cu"], warps)
    if units:
        found |= {"unit": units.name, "units_per_pass": units.count}
        if units.macs:
            macs = sum(map(sass_macs, body)) * warps
            found["mac_redundancy"] = round(macs / (units.count * units.macs), 3)
    return found


def _loop(launch: Launch, chip: Chip, workgroups: int, units: Units | None) -> dict[str, Any]:
    assembly, warps = launch.compiled.asm["amdgcn"], launch.compiled.metadata.num_warps
    body = hot_loop(assembly)
    row: dict[str, Any] = {"in_loop": body is not None}
    body = body or instructions(assembly)
    row |= {
        "loop_instructions": len(body),
        "loop_mfma": dict(sorted(matrix_counts(body).items())),
        "mca_cycles": cycles(body, chip),
        "mca_issue_cycles": issue_cycles(body, chip),
        "mca_outside_cycles": cycles(_outside(instructions(assembly), body), chip),
    }
    row |= _memory(amd_local_bytes(body), amd_bytes_in_flight(body), workgroups, warps)
    if units:
        row |= {"unit": units.name, "units_per_pass": units.count}
        if row["mca_issue_cycles"]:
            row["simd_issue_cycles_per_unit"] = round(
                row["mca_issue_cycles"] * warps / units.count, 3
            )
        row["lds_simd_cycles_per_unit"] = round(
            row["lds_bytes_per_pass"] / LDS_BYTES_A_CLOCK / units.count, 3
        )
        if units.macs:
            row["mac_redundancy"] = round(matrix_macs(body) * warps / (units.count * units.macs), 3)
    return row


def measure(launch: Launch, chip: Chip, case: Case) -> dict[str, Any]:
    """The row of one launch."""
    constants = {
        k: v if isinstance(v, (int, float, bool, type(None))) else str(v)
        for k, v in launch.constants.items()
    }
    row: dict[str, Any] = {"config": constants, "grid": list(launch.grid)}
    units = case.units[launch.kernel](launch.constants) if launch.kernel in case.units else None
    if not chip.is_amd:
        row |= nvidia_resources(launch.compiled, chip)
        return row | _nvidia_loop(launch, row, units)
    row |= amd_resources(launch.compiled, chip)
    return row | _loop(launch, chip, row["wg_per_cu"], units)


def rows(operator: str, case_name: str, arch: str) -> dict[str, dict[str, Any]]:
    """Rows of a case on `arch` by kernel; a kernel launched again in the case gets a number."""
    return {kernel: row for kernel, (row, _) in _compiled(operator, case_name, arch).items()}


def compile_seconds(operator: str, case_name: str, arch: str) -> dict[str, float]:
    """CPU seconds that each kernel of a case took to compile for `arch`."""
    return {kernel: took for kernel, (_, took) in _compiled(operator, case_name, arch).items()}


@cache
def _compiled(operator: str, case_name: str, arch: str) -> dict[str, tuple[dict[str, Any], float]]:
    case = next(case for case in operators()[operator] if case.name == case_name)
    with pretend(CHIPS[arch]) as launches:
        case.launch()
    found: dict[str, tuple[dict[str, Any], float]] = {}
    for launch in launches:
        again = sum(name.split("#")[0] == launch.kernel for name in found)
        name = f"{launch.kernel}#{again + 1}" if again else launch.kernel
        found[name] = measure(launch, CHIPS[arch], case), launch.seconds
    return found


def versions() -> dict[str, str | None]:
    """What the table depends on."""
    return {"triton": triton.__version__, "llvm_mca": tool_version(), "columns": COLUMNS}


def build(operator: str) -> dict[str, Any]:
    """The whole table of an operator, as kept in golden/."""
    table = {
        f"{case.name} | {arch} | {kernel}": row
        for case in operators()[operator]
        for arch in case.archs
        for kernel, row in rows(operator, case.name, arch).items()
    }
    return {"versions": versions(), "rows": table}


def read(operator: str) -> dict[str, Any]:
    """The kept table of an operator, empty when there is none."""
    path = GOLDEN / f"{operator}.json"
    return json.loads(path.read_text()) if path.exists() else {"versions": {}, "rows": {}}


def write(operator: str, table: dict[str, Any]) -> None:
    """Keeps the table of an operator."""
    (GOLDEN / f"{operator}.json").write_text(json.dumps(table, indent=1) + "\n")


def moved(kept: dict[str, Any], now: dict[str, dict]) -> list[str]:
    """The cells of rows `now` that are not as in the table `kept`. The cycle columns are compared
    where the same llvm-mca made them; a table with fewer columns in those that it has."""
    old = kept["versions"].get("columns") != COLUMNS
    same_tool = kept["versions"].get("llvm_mca") == tool_version() and not old
    rows = kept["rows"]
    if old:
        now = {
            name: {column: cell for column, cell in row.items() if column in rows[name]}
            if name in rows
            else row
            for name, row in now.items()
        }
    return difference(rows, now, () if same_tool else CYCLE_COLUMNS)


def difference(
    kept: dict[str, dict], now: dict[str, dict], skip: tuple[str, ...] = ()
) -> list[str]:
    """One readable line for every cell of rows `now` that is not as `kept`, without the columns in
    `skip`."""
    lines = []
    for name in sorted(kept.keys() | now.keys()):
        if name not in now or name not in kept:
            lines.append(f"{name}: {'gone' if name not in now else 'new'}")
            continue
        old, new = json.loads(json.dumps(kept[name])), json.loads(json.dumps(now[name]))
        for column in sorted((old.keys() | new.keys()) - set(skip)):
            if old.get(column) != new.get(column):
                lines.append(f"{name}: {column} {old.get(column)} -> {new.get(column)}")
    return lines
