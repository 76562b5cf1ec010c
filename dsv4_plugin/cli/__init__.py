"""The `dsv4` command: one file of this package a subcommand.

A subcommand `name.py` has a docstring, whose first line is its help, `add_arguments(parser)` and
`run(arguments) -> int` (the exit status). One that sets `TAKES_OTHER_ARGUMENTS = True` finds what
its parser does not know in `arguments.other`, a list; anywhere else that is an error.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

USER_ERROR = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dsv4 argv...` and returns the exit status.

    A wrong input, which this package reports by an exception class of its own, and a file that
    cannot be used become one line on stderr and status 2; other exceptions are defects and keep
    their traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(names))
        return 0 if argv else USER_ERROR
    name = argv[0].replace("-", "_")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = (
            f"did you mean {near[0]}?" if near else f"there are {', '.join(map(_spelled, names))}"
        )
        return _fail(f"no command {argv[0]!r}; {hint}")
    try:
        module = importlib.import_module(f"{__name__}.{name}")
        return module.run(_parse(module, name, argv[1:]))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dsv4_plugin"):
            raise
        return _fail(
            f"this command needs the Python package {error.name}, which is not installed;"
            f" {_remedy(error.name)}"
        )
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        if not type(error).__module__.startswith("dsv4_plugin."):
            raise
        return _fail(str(error))


_DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Modules whose distribution has another name."""
_FOR_USERS = ("bench", "flydsl", "host")
"""Extras that commands need, the smallest first."""


def _remedy(module: str) -> str:
    """The installation that brings a missing module: this package itself, or the extra that lists
    its distribution."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    top = module.partition(".")[0]
    wanted = canonicalize_name(_DISTRIBUTIONS.get(top, top))
    brought = [
        requirement
        for requirement in map(Requirement, importlib.metadata.requires("dsv4_plugin") or ())
        if canonicalize_name(requirement.name) == wanted
    ]
    if any(requirement.marker is None for requirement in brought):
        return "pip install dsv4_plugin brings it"
    extras = [
        extra
        for extra in _FOR_USERS
        for requirement in brought
        if requirement.marker.evaluate({"extra": extra})
    ]
    # What no extra lists comes with SGLang or the machine.
    return f"pip install 'dsv4_plugin[{extras[0] if extras else 'host'}]' brings it"


def _parse(module, name: str, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"dsv4 {_spelled(name)}",
        description=module.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    if not getattr(module, "TAKES_OTHER_ARGUMENTS", False):
        return parser.parse_args(argv)
    arguments, arguments.other = parser.parse_known_args(argv)
    return arguments


def _overview(names: list[str]) -> str:
    """The general help. The commands' help lines are read from their source: importing them would
    take seconds."""
    lines = [
        "usage: dsv4 COMMAND [-h] ...",
        "",
        "Serves DeepSeek-V4 through a stock SGLang.",
        "",
        "commands:",
    ]
    width = max(map(len, names), default=0)
    lines += [f"  {_spelled(name):<{width}}  {_help_line(name)}" for name in names]
    return "\n".join([*lines, "", "dsv4 COMMAND --help explains one."])


def _help_line(name: str) -> str:
    source = Path(__path__[0], f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _fail(message: str) -> int:
    print(f"dsv4: error: {message}", file=sys.stderr)
    return USER_ERROR
