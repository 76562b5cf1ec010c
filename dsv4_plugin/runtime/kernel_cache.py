"""What was built into Triton's cache: a manifest of each build, checked when it is read, and an
archive of it that another machine takes in.

A cache folder is one compiled kernel; those of other languages lie in folders of theirs, where
several may share one. Compilers write files whole or not at all, but do not notice one that was cut
off later; the manifest's checksums do.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .. import __file__ as _package
from .. import device
from ..config import Geometry
from . import languages
from .languages import BuildError, Kernel, compile_variants
from .precompile import Load, compile_share, count, share

FORMAT = 1
WAIT_SECONDS = 1800.0
"""For another build in the same cache; a whole one takes minutes."""
_SOURCES = (
    *("cache", "kernels", "model", "ops"),
    *("runtime/precompile.py", "runtime/languages.py", "config.py", "formats.py"),
)


def root(given: str | None = None) -> Path:
    """The cache that Triton uses in a server here, or `given`."""
    from triton import knobs

    if given is None and "TRITON_CACHE_DIR" not in os.environ and device.package_version("sglang"):
        return device.host_caches() / "triton"
    return Path(given or knobs.cache.dir).expanduser().absolute()


def point_languages() -> None:
    """Has other languages than Triton look where `build` puts their kernels, those whose variable
    the user did not set: before they are imported."""
    places = languages.places(root()) if languages.named() else {}
    for variable, place in places.items():
        if os.environ.get(variable) in (None, str(device.host_caches() / Path(place).name)):
            os.environ[variable] = place


def sources() -> str:
    """A digest of the code that decides which kernels there are."""
    digest, package = hashlib.sha256(), Path(_package).parent
    for name in _SOURCES:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What a compiled kernel depends on besides its source."""
    return {
        "dsv4_plugin": device.package_version("dsv4_plugin") or "unknown",
        "triton": device.package_version("triton") or "absent",
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "sources": sources()[:16],
        **languages.versions(),
    }


@dataclass
class Manifest:
    """One build: what it is for, what it was made with, and its kernels' files."""

    model: str
    arch: str
    tp: int
    ep: int
    load: dict[str, int]
    versions: dict[str, str] = field(default_factory=versions)
    choices: dict[str, str] = field(default_factory=languages.choices)
    """Implementations that flags named, by operator."""
    kernels: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    format: int = FORMAT

    @property
    def name(self) -> str:
        return f"dsv4-{self.model}-{self.arch}-tp{self.tp}-ep{self.ep}.json"

    def write(self, cache: Path) -> Path:
        """Writes it whole or not at all."""
        path = cache / self.name
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False, suffix=".tmp") as out:
            json.dump(asdict(self), out, indent=1)
        os.replace(out.name, path)
        return path

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises BuildError for a file that is no manifest of this format."""
        return cls.of(path.read_text(), str(path))

    @classmethod
    def of(cls, text: str, where: str) -> Manifest:
        try:
            manifest = cls(**{"choices": {}} | json.loads(text))
        except (TypeError, ValueError) as error:
            raise BuildError(f"{where} is no manifest of a build: {error}") from None
        if manifest.format != FORMAT:
            raise BuildError(f"{where} has format {manifest.format}, this version reads {FORMAT}")
        return manifest

    def differences(self) -> list[str]:
        """What this machine has otherwise than the build had. A language that flags name here and
        that took no part in the build is no difference."""
        here = versions()
        return [
            f"{name} {built}, here {found}"
            for name, built in self.versions.items()
            if built != (found := here.get(name) or device.package_version(name) or "absent")
        ]

    def remove_damaged(self, cache: Path) -> int:
        """Removes the kernels whose files are not as they were built; returns how many."""
        kept = []
        for kernel in self.kernels:
            if _is_whole(kernel, cache):
                kept.append(kernel)
            else:
                for name in kernel["files"]:
                    (cache / kernel["folder"] / name).unlink(missing_ok=True)
        damaged = len(self.kernels) - len(kept)
        self.kernels = kept
        return damaged

    def size(self, cache: Path) -> int:
        """Bytes of its kernels."""
        return sum(
            (cache / kernel["folder"] / name).stat().st_size
            for kernel in self.kernels
            for name in kernel["files"]
        )


def built_ahead(model: str, arch: str, tp: int, ep: int) -> int:
    """Kernels that a build for this server left in Triton's cache, with these versions."""
    expected = Manifest(Path(model).resolve().name, arch, tp, ep, {})
    try:
        before = Manifest.read(root() / expected.name)
    except (BuildError, OSError):
        return 0
    same = (before.versions, before.choices) == (expected.versions, expected.choices)
    return len(before.kernels) if same else 0


class Built(NamedTuple):
    """What a build came to."""

    manifest: Manifest
    compiled: int
    damaged: int
    """Kernels of an earlier build that were no longer as it left them."""
    seconds: float


def checksums(folder: Path, names: Sequence[str] = ()) -> dict[str, str]:
    """SHA-256 of the files of a kernel by name, of all in its folder or of `names` that are there.
    Of the file that says where the others lie, only their names count."""
    return {
        path.name: hashlib.sha256(_portable(path)).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.name in names if names else path.name != "lock")
    }


def _is_whole(kernel: dict[str, Any], cache: Path) -> bool:
    """Whether the files of a manifest's kernel lie in `cache` as they were built."""
    folder = cache / kernel["folder"]
    return folder.is_dir() and checksums(folder, kernel["files"]) == kernel["files"]


def _portable(path: Path) -> bytes:
    content = path.read_bytes()
    if not path.name.startswith("__grp__"):
        return content
    try:
        group = json.loads(content)["child_paths"]
    except (ValueError, KeyError, TypeError):
        return content
    return json.dumps({name: Path(where).name for name, where in sorted(group.items())}).encode()


@contextmanager
def locked(cache: Path, seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """One build at a time in a cache. Raises BuildError, which names the other one, when it has not
    ended after `seconds`."""
    import filelock

    cache.mkdir(parents=True, exist_ok=True)
    holder = cache / ".dsv4-build.holder"
    try:
        with filelock.FileLock(cache / ".dsv4-build.lock", timeout=seconds):
            holder.write_text(f"process {os.getpid()} on {os.uname().nodename}")
            yield
    except filelock.Timeout:
        said = holder.read_text() if holder.exists() else "another process"
        raise BuildError(
            f"{said} has been building in {cache} for more than {seconds:.0f} s; wait for it or end"
            " it, then start again"
        ) from None


def build(
    manifest: Manifest,
    geometry: Geometry,
    load: Load,
    cache: Path,
    jobs: int,
    begin: Callable[[int], None] = lambda kernels: None,
    done: Callable[[Kernel], None] = lambda kernel: None,
) -> Built:
    """Compiles what is missing of a server's kernels into `cache`, `jobs` processes at a time, and
    writes `manifest`. What an earlier build left there whole is kept, finished or not. `begin` gets
    the number of kernels, if there is anything to do, and `done` each of them.

    Raises BuildError where a kernel does not compile.
    """
    started = time.perf_counter()
    with locked(cache):
        path, damaged = cache / manifest.name, 0
        if path.exists():
            before = Manifest.read(path)
            whole, damaged = len(before.kernels), before.remove_damaged(cache)
            if (
                whole
                and not damaged
                and before.versions == manifest.versions
                and (before.choices, before.load) == (manifest.choices, manifest.load)
            ):
                return Built(before, 0, 0, time.perf_counter() - started)
        expected, others = _expected(manifest, geometry, load)
        begin(expected + len(others))
        found = list(_compiled(manifest, geometry, load, cache, jobs, done))
        for kernel in compile_variants(others, manifest.arch, cache):
            done(kernel)
            found.append(kernel)
        manifest.kernels = [
            {
                "name": kernel.name,
                "language": kernel.language,
                "folder": kernel.folder,
                "seconds": round(kernel.seconds, 2),
                **kernel.metadata,
                "files": checksums(cache / kernel.folder, kernel.files),
            }
            for kernel in sorted(found, key=lambda kernel: (kernel.name, kernel.folder))
        ]
        manifest.seconds = round(time.perf_counter() - started, 1)
        manifest.write(cache)
    compiled = sum(kernel.compiled for kernel in found)
    return Built(manifest, compiled, damaged, time.perf_counter() - started)


def _expected(
    manifest: Manifest, geometry: Geometry, load: Load
) -> tuple[int, list[languages.Variant]]:
    """What `count` says, asked in another process: a language that a flag names is imported for it,
    and may not be beside what this process imports later."""
    parallel = share(geometry, manifest.tp, manifest.ep)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(count, geometry, parallel, manifest.arch, load).result()


def _compiled(
    manifest: Manifest,
    geometry: Geometry,
    load: Load,
    cache: Path,
    jobs: int,
    done: Callable[[Kernel], None],
) -> Iterator[Kernel]:
    """The kernels of all workers, in the order in which they end."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, context) as pool:
        ended = manager.Queue()
        shares = [
            pool.submit(
                _work,
                geometry,
                manifest.tp,
                manifest.ep,
                manifest.arch,
                load,
                str(cache),
                worker,
                jobs,
                ended,
            )  # fmt: skip
            for worker in range(jobs)
        ]
        left = jobs
        while left:
            kernel = ended.get()
            if kernel is None:
                left -= 1
            else:
                done(kernel)
                yield kernel
        for each in shares:
            each.result()


def _work(
    geometry: Geometry,
    tp: int,
    ep: int,
    arch: str,
    load: Load,
    cache: str,
    worker: int,
    workers: int,
    ended: Any,
) -> None:
    """One worker's share, in a process of its own."""
    from triton import knobs

    knobs.cache.dir = cache
    try:
        compile_share(geometry, share(geometry, tp, ep), arch, load, worker, workers, ended.put)
    finally:
        ended.put(None)


def pack(manifests: Sequence[Manifest], cache: Path, archive: Path) -> int:
    """Writes the kernels of `manifests` and these to `archive`; returns its bytes.

    Raises BuildError where a kernel is not as it was built.
    """
    for manifest in manifests:
        if manifest.remove_damaged(cache):
            raise BuildError(f"kernels of {manifest.name} in {cache} are damaged; build them again")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=archive.parent, delete=False, suffix=".tmp") as out:
        with tarfile.open(fileobj=out, mode="w:gz") as tar:
            for manifest in manifests:
                _add(tar, manifest.name, json.dumps(asdict(manifest)).encode())
            kernels = [kernel for manifest in manifests for kernel in manifest.kernels]
            for name in sorted({f"{k['folder']}/{name}" for k in kernels for name in k["files"]}):
                tar.add(cache / name, name, recursive=False)
    os.replace(out.name, archive)
    return archive.stat().st_size


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def unpack(archive: Path, cache: Path) -> list[Manifest]:
    """Takes the kernels of `archive` into `cache`; returns what they are for.

    Raises BuildError, before anything changes there, for an archive of other versions, or one whose
    files are not those it was made of.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".dsv4-unpack-") as name:
        place = Path(name)
        try:
            with tarfile.open(archive, "r:gz") as tar:
                tar.extractall(place, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise BuildError(
                f"{archive} is no archive of a build, or is cut off: {error}"
            ) from None
        manifests = [Manifest.read(path) for path in sorted(place.glob("dsv4-*.json"))]
        if not manifests:
            raise BuildError(f"{archive} holds no manifest of a build")
        for manifest in manifests:
            differences = manifest.differences()
            if differences:
                raise BuildError(
                    f"{archive} was built with {'; '.join(differences)}. Build again here, or"
                    " install those versions"
                )
            for kernel in manifest.kernels:
                if not _is_whole(kernel, place):
                    raise BuildError(
                        f"{archive} is damaged: {kernel['name']} is not as it was built"
                    )
        for folder in {kernel["folder"] for manifest in manifests for kernel in manifest.kernels}:
            _settle(place / folder, cache / folder)
        for manifest in manifests:
            manifest.write(cache)
    return manifests


def _settle(folder: Path, destination: Path) -> None:
    """Moves a kernel's files into the cache, last the one by which Triton finds the others, which
    says from then on where they lie."""
    for path in folder.glob("__grp__*"):
        names = json.loads(path.read_text())["child_paths"]
        group = {name: str(destination / Path(where).name) for name, where in names.items()}
        path.write_text(json.dumps({"child_paths": group}))
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name.startswith("__grp__")):
        os.replace(path, destination / path.name)
