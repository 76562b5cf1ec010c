"""`dsv4 recipe check` where torch says that there are eight MI355X: the host then resolves options
as on ROCm. Nothing runs; sgl_kernel and aiter, which it imports there, are empty."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("sgl_kernel", "aiter"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(__path__=[], __version__="0.0.0")

    def exec_module(self, module):
        pass


def pretend(directory: Path) -> None:
    """From here on; `directory` takes a program for PATH."""
    sys.meta_path.insert(0, EmptyModules())
    properties = SimpleNamespace(
        name="AMD Instinct MI355X",
        gcnArchName="gfx950:sramecc+:xnack-",
        major=9,
        minor=5,
        total_memory=288 << 30,
        multi_processor_count=256,
    )
    torch.version.hip, torch.version.cuda = "7.0", None
    for name, value in {
        "is_available": True,
        "device_count": 8,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": (9, 5),
        "get_device_properties": properties,
        "mem_get_info": (280 << 30, 288 << 30),
    }.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    rocminfo = directory / "rocminfo"  # of which the host reads the memory of a GPU, in KB
    rocminfo.write_text(
        f'#!/bin/sh\necho "gfx950"\necho "Pool 1"\necho "Size: {288 << 20}(0x0) KB"\n'
    )
    rocminfo.chmod(0o755)
    os.environ["PATH"] = f"{directory}{os.pathsep}{os.environ['PATH']}"


def resolve(launches):
    """As the command's own, in forks of this process."""
    from dsv4_plugin.host import arguments

    answers = []
    for words in launches:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:
            answers.append(process.submit(arguments._resolve, words).result())
    return answers


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        pretend(Path(directory))
        from sglang.srt.utils import is_gfx95_supported, is_hip

        from dsv4_plugin.cli import main
        from dsv4_plugin.host import arguments

        print("ROCm", is_hip(), "gfx95", is_gfx95_supported())
        arguments.resolve = resolve
        sys.exit(main(["recipe", "check", *sys.argv[1:]]))
