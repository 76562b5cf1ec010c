"""Look at this machine and say what is wrong: device, packages, switches, SGLang, seams, patches,
caches.

Nothing is changed. The exit status is 1 when something is wrong; each line says what to do.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..host import doctor

    with Console(stderr=True).status("looking at this machine") as looking:
        checks = []
        for check in doctor.examine():
            checks.append(check)
            looking.update(f"looking at this machine: {check.name} is {check.status}")
    wrong = [check for check in checks if check.status == doctor.WRONG]
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        _print(checks, len(wrong))
    return 1 if wrong else 0


def _print(checks: list, wrong: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colour = {"ok": "green", "warning": "yellow", "wrong": "bold red"}
    table = Table("", "what", box=None, pad_edge=False)
    table.add_column("found, and what to do", overflow="fold")
    for check in checks:
        advice = f"\n-> {check.advice}" if check.advice else ""
        table.add_row(
            f"[{colour[check.status]}]{check.status}[/]",
            escape(check.name),
            escape(check.found + advice),
        )
    console = Console()
    console.print(table)
    console.print(
        f"{wrong} of {len(checks)} wrong" if wrong else f"all well, {len(checks)} looked at"
    )
