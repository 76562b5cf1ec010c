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
    hot_loop,
    instructions,
    matrix_counts,
    matrix_macs,
    nvidia_resources,
)
from chips import CHIPS, Chip
from cycles import cycles, issue_cycles, tool_version
from pretend import Launch, pretend
from registry import Case, Units, operators

GOLDEN = Path(__file__).parent / "golden"
CYCLE_COLUMNS = ("mca_cycles", "mca_issue_cycles", "simd_issue_cycles_per_unit")
"""Columns that exist only where llvm-mca is installed."""
BEST_MACS = {"16-bit": 2048, "8-bit": 4096, "4-bit": 8192}
"""Multiply-adds of a gfx950 SIMD in 4 clocks, by operand width."""


def _loop(launch: Launch, chip: Chip, units: Units | None) -> dict[str, Any]:
    assembly, warps = launch.compiled.asm["amdgcn"], launch.compiled.metadata.num_warps
    body = hot_loop(assembly)
    row: dict[str, Any] = {"in_loop": body is not None}
    body = body or instructions(assembly)
    row |= {
        "loop_instructions": len(body),
        "loop_mfma": dict(sorted(matrix_counts(body).items())),
        "mca_cycles": cycles(body, chip),
        "mca_issue_cycles": issue_cycles(body, chip),
    }
    if units:
        row |= {"unit": units.name, "units_per_pass": units.count}
        if row["mca_issue_cycles"]:
            row["simd_issue_cycles_per_unit"] = round(
                row["mca_issue_cycles"] * warps / units.count, 3
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
    if not chip.is_amd:
        return row | nvidia_resources(launch.compiled)
    units = case.units[launch.kernel](launch.constants) if launch.kernel in case.units else None
    return row | amd_resources(launch.compiled, chip) | _loop(launch, chip, units)


@cache
def rows(operator: str, case_name: str, arch: str) -> dict[str, dict[str, Any]]:
    """Rows of a case on `arch` by kernel; a kernel launched again in the case gets a number."""
    case = next(case for case in operators()[operator] if case.name == case_name)
    with pretend(CHIPS[arch]) as launches:
        case.launch()
    found: dict[str, dict[str, Any]] = {}
    for launch in launches:
        again = sum(name.split("#")[0] == launch.kernel for name in found)
        found[f"{launch.kernel}#{again + 1}" if again else launch.kernel] = measure(
            launch, CHIPS[arch], case
        )
    return found


def versions() -> dict[str, str | None]:
    """What the table depends on."""
    return {"triton": triton.__version__, "llvm_mca": tool_version()}


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
