"""Print the table of switches: every variable, the value it has now, where that comes from, and
what it means.

Nothing needs to be set: the defaults are the best settings. docs/flags.md is the output of `dsv4
flags --markdown`.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--markdown",
        action="store_true",
        help="print docs/flags.md, which does not depend on the environment",
    )


def run(arguments: argparse.Namespace) -> int:
    from .. import device, flags
    from ..flags_document import markdown

    # Without torch there are no operators; the flags then take any name of an implementation.
    if device.package_version("torch") is not None:
        from ..host import kernels  # noqa: F401

    if arguments.markdown:
        print(markdown(), end="")
        return 0
    flags.check()
    if arguments.json:
        print(json.dumps({"flags": list(map(_row, flags.FLAGS)), "notes": flags.notes()}, indent=2))
        return 0
    _print_table(flags)
    return 0


def _row(flag) -> dict[str, object]:
    from .. import flags

    now = flags.setting(flag.name)
    values = flag.form if flag.form else list(flag.values)
    return {
        "name": flag.name,
        "value": now.value,
        "source": now.source,
        "default": flag.default,
        "values": values,
        "meaning": flag.meaning,
        "mirrors": flags.mirrors(flag.name),
    }


def _print_table(flags) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    general = Table("switch", "value", "from", "meaning", box=None, pad_edge=False)
    operators = Table(
        "operator", "value", "from", "of", "layers", "meaning", box=None, pad_edge=False
    )
    for flag in flags.FLAGS:
        now = flags.setting(flag.name)
        cells, style = (
            [flag.name, escape(now.value or "-"), escape(now.source)],
            ("" if now.source == "default" else "bold"),
        )
        if flag.operator:
            operators.add_row(
                *cells,
                " ".join(flag.values),
                flags.read(flags.layers_flag(flag.operator)) or "all",
                flags.OPERATORS[flag.operator],
                style=style,
            )
        elif not flag.name.startswith(flags.LAYERS):
            general.add_row(*cells, escape(flag.meaning), style=style)
    console = Console()
    console.print(general, "", operators)
    for line in flags.notes():
        console.print(escape(f"note: {line}"), soft_wrap=True)
