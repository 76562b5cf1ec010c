"""Compiles every kernel anew, keeps the table, prints what moved, and on request the table as
markdown.

    python tests/compile/renew.py [--dry-run] [--markdown] [operator ...]
"""

from __future__ import annotations

import argparse
import sys

import table
from cycles import tool
from registry import operators

COLUMNS = (
    "num_warps",
    "vgpr",
    "sgpr",
    "lds",
    "wg_per_cu",
    "mfma",
    "loop_instructions",
    "mca_cycles",
    "mca_issue_cycles",
    "mca_outside_cycles",
    "simd_issue_cycles_per_unit",
    "lds_simd_cycles_per_unit",
    "bytes_in_flight_per_cu",
    "mac_redundancy",
)


def markdown(rows: dict[str, dict]) -> str:
    """The rows as a markdown table."""

    def cell(row: dict, column: str) -> str:
        value = row.get(column)
        if isinstance(value, dict):
            return (
                ", ".join(f"{name.removeprefix('v_mfma_f32_')}×{n}" for name, n in value.items())
                or "–"
            )
        return "–" if value is None else str(value)

    lines = [
        "| case | arch | kernel | " + " | ".join(COLUMNS) + " |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for name, row in rows.items():
        if "config" in row:
            lines.append(
                f"| {name} | " + " | ".join(cell(row, column) for column in COLUMNS) + " |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operators", nargs="*", help="only these (default: all)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what moved, keep the old table"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table")
    arguments = parser.parse_args()
    unknown = set(arguments.operators) - set(operators())
    if unknown:
        parser.error(
            f"no cases for {', '.join(sorted(unknown))}; there are {', '.join(operators())}"
        )
    chosen = arguments.operators or list(operators())
    losing = [name for name in chosen if table.read(name)["versions"].get("llvm_mca")]
    if tool() is None and not arguments.dry_run and losing:
        parser.error(
            f"the cycle columns of {', '.join(losing)} need llvm-mca 22 (apt-get install llvm-22, "
            "or LLVM_MCA=path); --dry-run compares the other columns without it"
        )
    for operator in chosen:
        kept, now = table.read(operator), table.build(operator)
        lines = table.moved(kept, now["rows"])
        print(f"{operator}: {len(now['rows'])} rows, {len(lines)} cells moved", *lines, sep="\n  ")
        if arguments.markdown:
            print(markdown(now["rows"]))
        if not arguments.dry_run:
            table.write(operator, now)
    return 0


if __name__ == "__main__":
    sys.exit(main())
