"""A GPU that is not there: kernels launched under it are compiled for its architecture, recorded,
and not run.

The wrappers of the package are called as in production, with tensors on torch's meta device, so
that tile sizes, warps and split counts are their own choice for that shape.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from chips import Chip
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dsv4_plugin import device
from dsv4_plugin.runtime.precompile import Driver


class CompilerError(AssertionError):
    """LLVM wrote an error and went on: what it made is not the kernel."""


@contextmanager
def _no_diagnostics() -> Iterator[None]:
    """Raises CompilerError when native code writes an error to this process's stderr, as LLVM does
    without failing."""
    with tempfile.TemporaryFile() as told:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(told.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
        told.seek(0)
        text = told.read().decode(errors="replace")
    if "error:" in text:
        raise CompilerError(text)


@functools.cache
def _fresh_cache() -> str:
    """A cache directory of this process alone."""
    directory = tempfile.TemporaryDirectory(prefix="dsv4-compile-")
    atexit.register(directory.cleanup)
    return directory.name


@dataclass(frozen=True)
class Launch:
    """A compiled kernel, its compile-time constants and its grid."""

    kernel: str
    constants: dict[str, Any]
    grid: tuple[int, ...]
    compiled: Any
    seconds: float
    """CPU time of this process to compile it; near 0 for one that was compiled before."""


@contextmanager
def pretend(chip: Chip) -> Iterator[list[Launch]]:
    """Within it this process believes in `chip`; yields the list that its launches are appended
    to."""
    launches: list[Launch] = []
    launch, arch = JITFunction.run, device.arch
    try:
        before = driver.active
    except RuntimeError:  # no GPU, or several kinds: Triton has no default
        before = None

    def compile_only(self, *args, grid, warmup, **kwargs):
        start = time.process_time()
        with _no_diagnostics():
            compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args)) | kwargs
        constants = {p.name: given.get(p.name, p.default) for p in self.params if p.is_constexpr}
        launches.append(
            Launch(
                self.__name__,
                constants,
                grid(constants) if callable(grid) else tuple(grid),
                compiled,
                time.process_time() - start,
            )
        )
        return compiled

    with knobs.cache.scope():
        # A kernel from the cache on disk would not be compiled, and LLVM's errors not seen.
        knobs.cache.dir = _fresh_cache()
        driver.set_active(Driver(chip.arch, chip.target))
        JITFunction.run, device.arch = compile_only, lambda: chip.arch
        try:
            yield launches
        finally:
            JITFunction.run, device.arch = launch, arch
            driver.set_active(before)
