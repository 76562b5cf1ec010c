"""Compile the kernels of a server ahead, for a GPU that need not be here: MODEL, `pro` or `flash`.

They go into the cache where a server finds them: it then compiles nothing. What was built
can be packed into an archive and taken in by another machine with the same versions.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .plan import _positive

if TYPE_CHECKING:
    from ..runtime.kernel_cache import Built, Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a released model by name, or a config.json or its directory",
    )
    parser.add_argument("--arch", help="gfx950, gfx942 or sm_90 (default: that of the GPU here)")
    for option, default, text in (
        ("--tp", 8, "GPUs that share the model (default: 8)"),
        ("--ep", 1, "of these, groups that hold different experts (default: 1)"),
        ("--chunk", 8192, "tokens of the largest prefill step (default: 8192)"),
        ("--requests", 256, "requests that decode at once (default: 256)"),
        ("--context", None, "tokens of the longest request (default: the model's maximum)"),
        ("--jobs", len(os.sched_getaffinity(0)), "processes that compile (default: one a core)"),
    ):
        parser.add_argument(option, type=_positive, default=default, metavar="N", help=text)
    parser.add_argument(
        "--draft", action="store_true", help="of a server that uses the model's DSpark draft"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="cache to build in (default: where a server here looks)"
    )
    archive = parser.add_mutually_exclusive_group()
    archive.add_argument("--pack", metavar="FILE", help="then write what was built to an archive")
    archive.add_argument(
        "--wheel", metavar="DIR", help="then write a wheel: where it is installed a server takes it"
    )
    archive.add_argument("--unpack", metavar="FILE", help="take an archive in; MODEL is left out")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..runtime import kernel_cache

    cache = kernel_cache.root(arguments.out)
    if arguments.unpack:
        return _unpack(arguments, cache)
    if arguments.model is None:
        raise kernel_cache.BuildError("which model? give pro, flash, or a checkpoint's directory")
    built = _build(arguments, cache)
    if arguments.json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(built.manifest), indent=1))
    else:
        _say(built, cache)
    if arguments.pack:
        size = kernel_cache.pack([built.manifest], cache, Path(arguments.pack))
        if not arguments.json:
            print(f"packed into {arguments.pack}: {size / 1e6:.1f} MB")
    if arguments.wheel:
        from ..runtime import kernel_wheel

        path = kernel_wheel.write(built.manifest, cache, Path(arguments.wheel))
        if not arguments.json:
            print(f"pip install {path}    # {path.stat().st_size / 1e6:.1f} MB")
    return 0


def _build(arguments: argparse.Namespace, cache: Path) -> Built:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .. import device
    from ..checkpoint.released import load_geometry
    from ..runtime import kernel_cache, precompile

    arch = arguments.arch or device.arch()
    if arch not in precompile.TARGETS:
        raise precompile.BuildError(
            f"kernels are built for {', '.join(precompile.TARGETS)}, not for {arch}; name one with"
            " --arch"
        )
    geometry = load_geometry(arguments.model)
    if arguments.draft and geometry.dspark is None:
        raise precompile.BuildError(
            f"--draft builds for a DSpark draft, and {arguments.model} has none; leave it out"
        )
    load = precompile.Load(
        arguments.chunk,
        arguments.requests,
        arguments.context or geometry.max_position_embeddings,
        arguments.draft,
    )
    precompile.share(geometry, arguments.tp, arguments.ep)  # refuses a layout that does not fit
    name = arguments.model if arguments.model in ("pro", "flash") else Path(arguments.model).name
    manifest = kernel_cache.Manifest(name, arch, arguments.tp, arguments.ep, vars(load))
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("building", total=None)
        return kernel_cache.build(
            manifest,
            geometry,
            load,
            cache,
            arguments.jobs,
            begin=lambda kernels: bars.update(task, total=kernels),
            done=lambda kernel: bars.update(task, advance=1, description=kernel.name),
        )


def _say(built: Built, cache: Path) -> None:
    manifest = built.manifest
    kernels = len(manifest.kernels)
    print(
        f"{manifest.model} on tp{manifest.tp} ep{manifest.ep} for {manifest.arch}:"
        f" {kernels} kernels, {built.compiled} of them compiled now, in {built.seconds:.1f} s"
    )
    if built.damaged:
        print(f"{built.damaged} were damaged since they were built, and were built again")
    spilled = [each["name"] for each in manifest.kernels if each.get("vgpr_spill_count")]
    if spilled:
        print(f"registers are spilled by {', '.join(sorted(set(spilled)))}")
    print(f"{manifest.size(cache) / 1e6:.1f} MB in {cache}")


def _unpack(arguments: argparse.Namespace, cache: Path) -> int:
    from ..runtime import kernel_cache

    with kernel_cache.locked(cache):
        manifests: list[Manifest] = kernel_cache.unpack(Path(arguments.unpack), cache)
    for each in manifests:
        print(
            f"{each.model} on tp{each.tp} ep{each.ep} for {each.arch}: {len(each.kernels)} kernels"
            f" taken into {cache}"
        )
    return 0
