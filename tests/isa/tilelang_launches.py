"""TileLang's kernels on gfx950/: what TileLang would launch is lowered to HIP, compiled by a clang
that knows the chip, and executed."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from gfx950.machine import Launch, Options
from gfx950.triton_driver import Executed, execute_compiled, program


@functools.cache
def missing() -> str | None:
    """Why TileLang's kernels cannot be compiled here, or None."""
    if importlib.util.find_spec("tilelang") is None:
        return "tilelang is not installed"
    from dsv4_plugin.kernels.tilelang import build

    try:
        build.clang()
    except build.CompilerMissing as error:
        return str(error)
    return None


@contextmanager
def executing(arch: str, options: Options | None, run: bool, ran: list[Executed]) -> Iterator[None]:
    """Within it TileLang kernels run here, or are compiled alone; each launch is added to `ran`."""
    if missing():
        yield
        return
    from dsv4_plugin.kernels.tilelang import build

    def execute(kernel: build.Kernel, arguments: tuple, constants: dict[str, Any]) -> None:
        lowered = kernel.lower(arch, **constants)
        compiled = build.compiled(lowered, arch)
        values = lowered.bind(arguments)
        grid = lowered.grid(values)
        start = time.process_time()
        told, ready = Launch(), start
        if run:
            program(compiled.asm["hsaco"], lowered.name)
            ready = time.process_time()
            given = [values[name] for name in lowered.parameters]
            told = execute_compiled(compiled, grid, given, options)
        ran.append(Executed(compiled, grid, told, ready - start, time.process_time() - ready))

    with mock.patch.object(build.Kernel, "run", execute):
        yield
