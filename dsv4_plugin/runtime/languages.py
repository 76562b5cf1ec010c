"""Kernels that TileLang, FlyDSL or aiter compiles and not Triton, where a flag names them: which
variants a server meets, and how they get into the caches where those look for them.

The caches lie beside Triton's kernels. Each compiler has a process of its own: FlyDSL's MLIR ends a
process that has another one.
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
from ..kernels.aiter import MODULES
from ..ops.operator import AUTO, OPERATORS, Implementation
from . import code_object

DIRECTORIES = {
    "tilelang": "TILELANG_CACHE_DIR",
    "flydsl": "FLYDSL_RUNTIME_CACHE_DIR",
    "aiter": "AITER_JIT_DIR",
}
"""The variable that says where a language keeps what it compiles. aiter's modules, in HIP, count as
one: each is compiled when it is first called."""
_PACKAGES = {"aiter": "amd-aiter"}
"""Whose name is not the language's."""


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
    wanted = choices().values()
    return [name for name in DIRECTORIES if name in wanted and version(name)]


def choices() -> dict[str, str]:
    """The implementations that flags name, by operator."""
    found = {name: flags.implementation(name).value for name in flags.OPERATORS}
    return {name: value for name, value in found.items() if value != AUTO}


def version(language: str) -> str | None:
    """Of the package that is installed, or None."""
    return device.package_version(_PACKAGES.get(language, language))


def versions() -> dict[str, str]:
    """Of the languages that flags name."""
    return {name: version(name) or "absent" for name in named()}


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

    recorders = {
        "tilelang": _recording_tilelang,
        "flydsl": _recording_flydsl,
        "aiter": _recording_aiter,
    }
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


@contextmanager
def _recording_aiter(note: Callable[[Variant], None]) -> Iterator[None]:
    """The modules of every operator that is to run in aiter; the reference stands in for it."""
    load = Implementation.load

    def loaded(implementation: Implementation) -> Callable[..., Any]:
        if implementation.packages != ("amd-aiter",):
            return load(implementation)
        operator = next(
            each for each in OPERATORS.values() if implementation in each.implementations.values()
        )
        for module in MODULES[operator.name]:
            note(Variant("aiter", "aiter", module, ()))
        return operator.reference

    with mock.patch.object(Implementation, "load", loaded):
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
    compilers = {"tilelang": _tilelang, "flydsl": _flydsl, "aiter": _aiter}
    try:
        compiled = compilers[language](arch, place)
    except ImportError as error:
        raise BuildError(f"{language} does not load: {error}") from None
    return [_one(variant, compiled, arch, cache) for variant in variants]


def _one(
    variant: Variant, compiled: Callable[[Variant], tuple[Path, bytes]], arch: str, cache: Path
) -> Kernel:
    before = set(directory(variant.language, cache).rglob("*"))
    started = time.perf_counter()
    try:
        path, code = compiled(variant)
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
        code_object.facts(code),
        () if whole else (path.name,),
        variant.language,
    )


def _tilelang(arch: str, place: Path) -> Callable[[Variant], tuple[Path, bytes]]:
    os.environ[DIRECTORIES["tilelang"]] = str(place)
    from ..kernels.tilelang import build

    logging.getLogger("tilelang").setLevel(logging.WARNING)  # it prints a line a kernel

    if arch.startswith("gfx") and shutil.which("hipcc") is None:
        build.compile_without_rocm(arch)

    def compiled(variant: Variant) -> tuple[Path, bytes]:
        module = importlib.import_module(variant.module)
        kernel = next(
            each
            for each in vars(module).values()
            if isinstance(each, build.Kernel) and each.name == variant.name
        )
        path = Path(kernel.load(arch, **dict(variant.arguments))._tilelang_cache_path)
        return path, (path / "executable.so").read_bytes()

    return compiled


def _flydsl(arch: str, place: Path) -> Callable[[Variant], tuple[Path, bytes]]:
    from ..kernels.flydsl import build

    build.compile_only(arch, place)

    def compiled(variant: Variant) -> tuple[Path, bytes]:
        launcher = getattr(importlib.import_module(variant.module), variant.name)
        arguments = {
            name: value.make() if isinstance(value, Empty) else value
            for name, value in variant.arguments
        }
        return build.compiled(launcher, **arguments)

    return compiled


def _aiter(arch: str, place: Path) -> Callable[[Variant], tuple[Path, bytes]]:
    """Modules by aiter's own build, into the folder where it looks for them."""
    os.environ.update({DIRECTORIES["aiter"]: str(place), "GPU_ARCHS": arch})
    from aiter.jit import core

    known = inspect.signature(core.build_module).parameters

    def compiled(variant: Variant) -> tuple[Path, bytes]:
        path = place / f"{variant.name}.so"
        if not path.exists():
            given = core.get_args_of_build(variant.name)
            if not given["srcs"]:
                raise BuildError(f"aiter {version('aiter')} has no such module")
            words = {name: value for name, value in given.items() if name in known}
            core.build_module(**words | {"md_name": variant.name})
        return path, path.read_bytes()

    return compiled
