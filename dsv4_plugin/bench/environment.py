"""Where a measurement was made: versions, commit, machine, and the environment variables that steer
a server."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import flags
from ..device import package_version

_PACKAGES = (
    "dsv4_plugin",
    "sglang",
    "torch",
    "triton",
    "aiter",
    "flydsl",
    "tilelang",
    "transformers",
    "numpy",
)
_PREFIXES = (flags.PREFIX, "SGLANG_", *flags.LIBRARY_PREFIXES, "ROCR_", "TORCH", "PYTORCH_")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def steering(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of servers, kernel libraries and drivers; none whose name speaks of a
    secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith(_PREFIXES) and not any(word in name.upper() for word in _SECRET)
    }


def server_environment(pid: int | None) -> dict[str, str] | None:
    """`steering` of the variables with which the server of process `pid` was started, by this user
    on this machine.

    SGLang's workers write their titles over the variables that they were started with, so those of
    the process that started them are read. None when that cannot be read or has a title of its own.
    """
    try:
        parent = re.search(
            r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
        ).group(1)
        command, raw = (
            Path(f"/proc/{parent}/{name}").read_bytes().decode(errors="replace")
            for name in ("cmdline", "environ")
        )
    except OSError:
        return None
    if command.startswith("sglang::") or "\0PATH=" not in "\0" + raw:
        return None
    return steering(dict(entry.partition("=")[::2] for entry in raw.split("\0") if "=" in entry))


def versions() -> dict[str, str]:
    """Versions of the packages that are installed here, and of Python."""
    found = {name: package_version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        **{name: version for name, version in found.items() if version},
    }


def commit() -> str:
    """The last commit that changed this package's code, "+changes" when it was changed since; its
    version in an installation."""
    root = Path(__file__).parents[2]
    try:
        name = _git(root, "log", "-1", "--abbrev=12", "--format=%h", "--", "dsv4_plugin")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "dsv4_plugin")
    except (OSError, subprocess.CalledProcessError):
        return f"version {importlib.metadata.version('dsv4_plugin')}"
    return name + ("+changes" if changed else "")


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory in GB, kernel."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages / 1e9, 1),
        "kernel": platform.release(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
