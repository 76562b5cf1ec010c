"""A GPU made of this package: Triton and Gluon kernels launched under it are compiled for it and
their machine code is executed on the CPU tensors they were given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .code_object import load
from .machine import Launch, Options, Program, launch
from .waves import Memory


@dataclass
class Executed:
    """A launch of what Triton compiled."""

    compiled: Any = field(repr=False)
    grid: tuple[int, ...]
    told: Launch
    prepared: float
    """CPU seconds to decode and compile the instructions, 0 when they were known."""
    seconds: float

    @property
    def kernel(self) -> str:
        return self.compiled.metadata.name

    @property
    def hsaco(self) -> bytes:
        return self.compiled.asm["hsaco"]

    @property
    def program(self) -> Program:
        return program(self.hsaco, self.kernel)


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: str):
        self._arch = arch
        self.utils = SimpleNamespace(unload_module=lambda module: None)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", self._arch, 64)

    def get_current_device(self) -> str:
        return self._arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


_programs: dict[tuple[bytes, str], Program] = {}


def program(hsaco: bytes, name: str) -> Program:
    """The kernel `name` of a code object, prepared once."""
    if (hsaco, name) not in _programs:
        _programs[hsaco, name] = Program(load(hsaco)[name])
    return _programs[hsaco, name]


def execute_compiled(
    compiled: Any, grid: tuple[int, ...], values: list[Any], options: Options | None = None
) -> Launch:
    """Executes a kernel that Triton compiled. `values` are the arguments that it takes at run time:
    numbers, and tensors, whose storages are copied to the executor's memory and back."""
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

    def argument(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            start = value.untyped_storage().data_ptr()
            return places[start] + value.data_ptr() - start
        return 0 if value is None else value

    told = launch(
        program(compiled.asm["hsaco"], compiled.metadata.name),
        grid,
        compiled.metadata.num_warps * 64,
        [argument(value) for value in values],
        memory,
        compiled.metadata.shared,
        options,
    )
    for at, storage in storages.items():
        storage.copy_(torch.from_numpy(memory.view(places[at], len(storage))))
    return told


@contextmanager
def executing(
    arch: str = "gfx950", options: Options | None = None, run: bool = True
) -> Iterator[list[Executed]]:
    """Within it Triton kernels run here; yields the list of launches so far. Without `run` they are
    compiled alone."""
    ran: list[Executed] = []
    compile_and_run = JITFunction.run
    try:
        before = driver.active
    except RuntimeError:  # no GPU, or several kinds: Triton has no default
        before = None

    def execute(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_and_run(self, *args, grid=grid, warmup=True, **kwargs)
        given = {p.name: p.default for p in self.params if p.has_default}
        given |= dict(zip(self.arg_names, args)) | kwargs
        constants = {p.name: given.get(p.name) for p in self.params if p.is_constexpr}
        size = tuple(grid(constants) if callable(grid) else grid)
        # Triton makes arguments that are 1 constants too: its signature says which are left.
        signature = compiled.src.signature.items()
        values = [given[name] for name, kind in signature if kind != "constexpr"]
        start = time.process_time()
        told, ready = Launch(), start
        if run:
            program(compiled.asm["hsaco"], compiled.metadata.name)
            ready = time.process_time()
            told = execute_compiled(compiled, size, values, options)
        seconds = time.process_time() - ready
        ran.append(Executed(compiled, size, told, ready - start, seconds))
        return compiled

    driver.set_active(_Driver(arch))
    JITFunction.run = execute
    try:
        yield ran
    finally:
        JITFunction.run = compile_and_run
        driver.set_active(before)
