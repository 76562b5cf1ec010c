"""The `dsv4` command: one file of this package a subcommand.

A subcommand `name.py` has a docstring, whose first line is its help, `add_arguments(parser)` and
`run(arguments) -> int` (the exit status). One that sets `TAKES_OTHER_ARGUMENTS = True` finds what
its parser does not know in `arguments.other`, a list; anywhere else that is an error.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import os
import pkgutil
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from ..spelling import suggestion

USER_ERROR = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dsv4 argv...` and returns the exit status.

    A wrong input, which this package reports by an exception class of its own, and a file that
    cannot be used become one line on stderr and status 2; other exceptions are defects and keep
    their traceback.
    """
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dsv4_plugin"):
            raise
        return _fail(
            f"this command needs the Python package {error.name}, which is not installed;"
            f" {_remedy(error.name)}"
        )
    except SystemExit as leaving:  # rich leaves by itself when the reader has left
        if isinstance(leaving.__context__, BrokenPipeError):
            return 0
        raise
    except OSError as error:
        return 0 if _reader_left() else _fail(str(error))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:
        if not type(error).__module__.startswith("dsv4_plugin."):
            raise
        return _fail(str(error))


def _run(argv: list[str]) -> int:
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(names))
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        print(f"dsv4_plugin {version()}")
        return 0
    name = argv[0].replace("-", "_")
    if name not in names:
        hint = suggestion(argv[0], map(_spelled, names))
        return _fail(f"no command {argv[0]!r}; {hint}")
    module = importlib.import_module(f"{__name__}.{name}")
    return module.run(_parse(module, name, argv[1:]))


def _reader_left() -> bool:
    """Whether whoever read standard output has gone, as `head` does when it has seen enough. What
    is still to be printed then goes nowhere."""
    try:
        out = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    watched = select.poll()
    watched.register(out, 0)
    left = any(event & select.POLLERR for _, event in watched.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return left


_DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Modules whose distribution has another name."""
_OF_THE_MACHINE = {
    "torch": (
        "install the torch of your machine (ROCm or CUDA) and this package beside it, or use an"
        ' image that has SGLang and its torch: README, "Install beside a ROCm torch"'
    ),
    "triton": "it comes with the torch of your machine (ROCm or CUDA)",
    "aiter": (
        "it comes with AMD's ROCm images; the package of that name on PyPI is another one:"
        " https://github.com/ROCm/aiter"
    ),
}
"""Modules that PyPI would bring wrongly: pip replaces a ROCm build, or installs something else."""
_FOR_USERS = ("bench", "flydsl", "host")
"""Extras that commands need, the smallest first."""


def _remedy(module: str) -> str:
    """The installation that brings a missing module: this package itself, or the extra that lists
    its distribution."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    top = module.partition(".")[0]
    if top in _OF_THE_MACHINE:
        return _OF_THE_MACHINE[top]
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


def version() -> str:
    """This package's, "(not installed)" when it runs from a directory that no pip knows."""
    try:
        return importlib.metadata.version("dsv4_plugin")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


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
        "       dsv4 --version",
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
