"""Kernels that TileLang or FlyDSL compiles and not Triton, where a flag names them: which variants
a server meets, and how they get into the caches where those look for them.

Both caches lie beside Triton's kernels. Each language compiles in a process of its own: FlyDSL's
MLIR ends a process that has another one.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .. import device, flags

DIRECTORIES = {"tilelang": "TILELANG_CACHE_DIR", "flydsl": "FLYDSL_RUNTIME_CACHE_DIR"}
"""The variable that says where a language keeps what it compiles."""


class BuildError(RuntimeError):
    """A build that cannot be done here."""


@dataclass(frozen=True)
class Kernel:
    """One variant of a kernel in the cache."""

    name: str
    folder: str
    """Within the cache."""
    compiled: bool
    """Whether it had to be compiled; else it was there."""
    seconds: float
    metadata: dict[str, Any]
    files: tuple[str, ...] = ()
    """Its files in that folder; none for all."""
    language: str = "triton"


@dataclass(frozen=True)
class Empty:
    """A tensor of no rows in the place of one that a kernel gets."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def make(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype)


@dataclass(frozen=True)
class Variant:
    """A kernel and what it is compiled for."""

    language: str
    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...]


def named() -> list[str]:
    """The languages that flags name and that are installed."""
    wanted = {flags.implementation(name).value for name in flags.OPERATORS}
    return [name for name in DIRECTORIES if name in wanted and device.package_version(name)]


def versions() -> dict[str, str]:
    """Of the languages that flags name."""
    return {name: device.package_version(name) or "absent" for name in named()}


def directory(language: str, cache: Path) -> Path:
    """Where `language` keeps what it compiles, beside the kernels of Triton in `cache`."""
    return cache / language


def places(cache: Path) -> dict[str, str]:
    """Environment by which the languages that flags name find what was built into `cache`."""
    return {DIRECTORIES[name]: str(directory(name, cache)) for name in named()}


@contextmanager
def recording(meet: Callable[[Variant], None]) -> Iterator[None]:
    """Within it `meet` gets each variant that the named languages would launch, once."""
    seen: set[Variant] = set()

    def note(variant: Variant) -> None:
        if variant not in seen:
            seen.add(variant)
            meet(variant)

    recorders = {"tilelang": _recording_tilelang, "flydsl": _recording_flydsl}
    with ExitStack() as stack:
        for language in named():
            stack.enter_context(recorders[language](note))
        yield


@contextmanager
def _recording_tilelang(note: Callable[[Variant], None]) -> Iterator[None]:
    from ..kernels.tilelang.build import Kernel as TileLangKernel

    def run(kernel: Any, arguments: tuple, constants: dict[str, Any]) -> None:
        note(Variant("tilelang", kernel.__module__, kernel.name, tuple(sorted(constants.items()))))

    with mock.patch.object(TileLangKernel, "run", run):
        yield


@contextmanager
def _recording_flydsl(note: Callable[[Variant], None]) -> Iterator[None]:
    from ..kernels.flydsl.products import expert_product

    def run(launcher: Any, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(launcher.func)
        given = signature.bind(*args, **kwargs).arguments
        arguments = tuple(
            (name, _placeholder(signature.parameters[name], value)) for name, value in given.items()
        )
        note(Variant("flydsl", launcher.func.__module__, launcher.func.__name__, arguments))

    with mock.patch.object(type(expert_product), "__call__", run):
        yield


def _placeholder(parameter: inspect.Parameter, value: Any) -> Any:
    """What stands for an argument of a FlyDSL launcher: itself where it makes a variant."""
    if isinstance(value, torch.Tensor):
        return Empty(value.dtype, (0, *value.shape[1:]))
    if value is None or "Constexpr" in str(parameter.annotation):
        return value
    return type(value)(0)


def compile_variants(variants: Sequence[Variant], arch: str, cache: Path) -> Iterator[Kernel]:
    """Has each language compile its part of `variants` for `arch`, or find it in the cache.

    Raises BuildError where a kernel does not compile.
    """
    context = multiprocessing.get_context("spawn")
    for language in sorted({variant.language for variant in variants}):
        mine = [variant for variant in variants if variant.language == language]
        with ProcessPoolExecutor(1, context) as process:
            yield from process.submit(_compile, language, mine, arch, cache).result()


def _compile(language: str, variants: Sequence[Variant], arch: str, cache: Path) -> list[Kernel]:
    """The kernels of one language, in a process of its own."""
    place = directory(language, cache)
    place.mkdir(parents=True, exist_ok=True)
    compilers = {"tilelang": _tilelang, "flydsl": _flydsl}
    compiled = compilers[language](arch, place)
    return [_one(variant, compiled, arch, cache) for variant in variants]


def _one(variant: Variant, compiled: Callable[[Variant], Path], arch: str, cache: Path) -> Kernel:
    before = set(directory(variant.language, cache).rglob("*"))
    started = time.perf_counter()
    try:
        path = compiled(variant)
    except Exception as error:
        raise BuildError(f"{variant.name} does not compile for {arch}: {error}") from None
    seconds = time.perf_counter() - started
    whole = path.is_dir()
    folder, files = (path, list(path.iterdir())) if whole else (path.parent, [path])
    return Kernel(
        variant.name,
        str(folder.relative_to(cache)),
        not before.issuperset(files),
        seconds,
        {},
        () if whole else (path.name,),
        variant.language,
    )


def _tilelang(arch: str, place: Path) -> Callable[[Variant], Path]:
    os.environ[DIRECTORIES["tilelang"]] = str(place)
    from ..kernels.tilelang import build

    logging.getLogger("tilelang").setLevel(logging.WARNING)  # it prints a line a kernel

    if arch.startswith("gfx") and shutil.which("hipcc") is None:
        build.compile_without_rocm(arch)

    def compiled(variant: Variant) -> Path:
        module = importlib.import_module(variant.module)
        kernel = next(
            each
            for each in vars(module).values()
            if isinstance(each, build.Kernel) and each.name == variant.name
        )
        return Path(kernel.load(arch, **dict(variant.arguments))._tilelang_cache_path)

    return compiled


def _flydsl(arch: str, place: Path) -> Callable[[Variant], Path]:
    from ..kernels.flydsl import build

    build.compile_only(arch, place)

    def compiled(variant: Variant) -> Path:
        launcher = getattr(importlib.import_module(variant.module), variant.name)
        arguments = {
            name: value.make() if isinstance(value, Empty) else value
            for name, value in variant.arguments
        }
        return build.compiled(launcher, **arguments)

    return compiled
