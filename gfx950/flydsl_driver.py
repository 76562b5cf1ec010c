"""FlyDSL kernels launched under `executing()` are compiled for a GPU that is not here, and their
machine code is executed on the CPU tensors they were given.

FlyDSL reads its environment when it is imported: whoever does so says there that it shall compile
for that GPU and launch nothing (ARCH, FLYDSL_GPU_ARCH, COMPILE_ONLY=1).
"""

from __future__ import annotations

import inspect
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .machine import Launch, Options, launch
from .triton_driver import program
from .waves import Memory


@dataclass
class Built:
    """A kernel as FlyDSL compiled it."""

    name: str
    hsaco: bytes = field(repr=False)
    metadata: dict[str, int]
    """Registers, spills and local memory, by LLVM's names."""


@dataclass
class Executed:
    """A launch of it."""

    built: Built
    grid: tuple[int, ...]
    told: Launch


def built(ir: str) -> Built:
    """The one kernel in the MLIR that FlyDSL keeps of a compilation."""
    text = re.search(r'bin = "((?:[^"\\]|\\.)*)"', ir).group(1).encode()
    hsaco = re.sub(rb"\\(\\|[0-9A-Fa-f]{2})", _unescaped, text)
    numbers = dict(re.findall(r"(\w+) = (\d+) : i64", re.search(r"metadata = {.*?}", ir).group(0)))
    name = re.search(r'#gpu\.kernel_metadata<"(\w+)"', ir).group(1)
    return Built(name, hsaco, {key: int(value) for key, value in numbers.items()})


def _unescaped(found: re.Match[bytes]) -> bytes:
    """Of MLIR's strings: a byte as two digits, or a backslash."""
    return b"\\" if found.group(1) == b"\\" else bytes([int(found.group(1), 16)])


def packed(values: list[Any], memory: Memory, places: dict[int, int]) -> bytes:
    """FlyDSL's kernel arguments: a tensor is its address and a struct of int32 extents and int64
    strides, the last left out; numbers as they are."""
    raw = b""
    for value in values:
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            address = places[start] + value.data_ptr() - start
            raw += b"\0" * (-len(raw) % 8) + struct.pack("<Q", address)
            strides = value.stride()[:-1]
            raw += struct.pack(f"<{value.dim()}i", *value.shape)
            raw += struct.pack(f"<{len(strides)}q", *strides)
        else:
            raw += struct.pack("<f" if isinstance(value, float) else "<i", value)
    return raw


_built: dict[tuple, Built] = {}
"""By launcher, constants and types: FlyDSL compiles a specialization once in a process."""


@contextmanager
def executing(
    launcher: Any,
    kernel: Any,
    grid: Callable[..., tuple[int, ...]],
    options: Options | None = None,
    run: bool = True,
) -> Iterator[list[Executed]]:
    """Within it calls of the FlyDSL `launcher` run here; yields the launches so far. `kernel` is
    what it launches, or one that takes the same, whose parameters have the launcher's names, on a
    `grid` of its arguments. Without `run` they are compiled alone."""
    ran: list[Executed] = []
    call = type(launcher).__call__
    signature = inspect.signature(launcher.func)
    wanted = list(inspect.signature(kernel._func).parameters)

    def execute(self: Any, *args: Any, **kwargs: Any) -> None:
        if self is not launcher:
            return call(self, *args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        constants = {
            name: given[name]
            for name, parameter in signature.parameters.items()
            if "Constexpr" in str(parameter.annotation)
        }
        key = (
            self,
            tuple(constants.items()),
            *((value.dtype, value.dim()) for value in args if isinstance(value, torch.Tensor)),
        )
        if key not in _built:
            before = self._last_compiled
            call(self, *args, **kwargs)
            assert self._last_compiled is not before, "FlyDSL compiled nothing"
            _built[key] = built(str(self._last_compiled[1].ir))
        values = [given[name] for name in wanted if name not in constants]
        size = grid(**{name: value for name, value in given.items() if name != "stream"})
        told = _run(_built[key], size, values, options) if run else Launch()
        ran.append(Executed(_built[key], size, told))

    type(launcher).__call__ = execute
    try:
        yield ran
    finally:
        type(launcher).__call__ = call


def _run(kernel: Built, grid: tuple, values: list[Any], options: Options | None) -> Launch:
    storages = {
        value.untyped_storage().data_ptr(): torch.empty(0, dtype=torch.uint8).set_(
            value.untyped_storage()
        )
        for value in values
        if isinstance(value, torch.Tensor)
    }
    size = sum(len(storage) + 3 * Memory.GAP for storage in storages.values()) + (1 << 16)
    memory = Memory(size, options.seed if options else 0)
    places = {at: memory.put(storage.numpy()) for at, storage in storages.items()}
    told = launch(
        program(kernel.hsaco, kernel.name),
        grid,
        kernel.metadata["max_flat_workgroup_size"],
        packed(values, memory, places),
        memory,
        options=options,
    )
    for at, storage in storages.items():
        storage.copy_(torch.from_numpy(memory.view(places[at], len(storage))))
    return told
