"""Source patches of the host, for what no hook reaches: applied by the user, never by a server.

A record `patches/NAME.yaml` says what is changed, why, and how it will go; `patches/NAME.patch` is
the change as upstream would take it. Every file is known by its hash before and after, so a patch
is applied and reverted byte for byte, and on any other content it is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from .. import installation

APPLIED, NOT_APPLIED, DRIFTED = "applied", "not applied", "drifted"


class PatchError(RuntimeError):
    """A patch that is unknown, damaged, or does not fit the installed host."""


@dataclass(frozen=True)
class Patch:
    """One record and its change."""

    name: str
    title: str
    versions: str
    why: str
    without: str
    """What the user has without the patch."""
    upstream: str
    removal: str
    test: str
    files: dict[str, dict[str, str]]
    """Hashes (SHA-256) `original` and `patched` of each file, by its path in the sglang package."""
    diff: str

    def state(self, root: Path) -> str:
        """APPLIED, NOT_APPLIED or DRIFTED (some file is neither as released nor as patched) in the
        package at `root`."""
        found = {_side(root / path, hashes) for path, hashes in self.files.items()}
        return {frozenset({"original"}): NOT_APPLIED, frozenset({"patched"}): APPLIED}.get(
            frozenset(found), DRIFTED
        )

    def drift(self, root: Path) -> list[str]:
        """Files that are neither as released nor as patched."""
        return [path for path, hashes in self.files.items() if _side(root / path, hashes) is None]

    def apply(self, root: Path, revert: bool = False) -> dict[str, bytes]:
        """The files of the package at `root` as they are after applying (or reverting) this patch;
        nothing is written.

        Empty when that is their state already. Raises PatchError for drift, and for a damaged
        patch.
        """
        wanted = NOT_APPLIED if revert else APPLIED
        state = self.state(root)
        if state == wanted:
            return {}
        if state == DRIFTED:
            drift = self.drift(root)
            what = (
                f"{', '.join(drift)} is neither as released nor as patched"
                if drift
                else "only some of its files are patched"
            )
            raise PatchError(
                f"{self.name}: {what} in {root}; nothing was changed. Reinstall sglang"
                f" {self.versions} (pip install --force-reinstall --no-deps), then apply it again"
            )
        result = _applied(self, root, revert)
        for path, content in result.items():
            if _hash(content) != self.files[path]["original" if revert else "patched"]:
                raise PatchError(
                    f"{self.name}: its .patch file does not give the content that its record names"
                    f" for {path}; it is damaged, reinstall dsv4_plugin"
                )
        return result


def patches(where: Path | None = None) -> list[Patch]:
    """All patches. Raises PatchError for a record that cannot be read."""
    where = installation.directory("patches") if where is None else where
    found = []
    for record in sorted(where.glob("*.yaml")):
        try:
            found.append(
                Patch(
                    record.stem,
                    diff=record.with_suffix(".patch").read_text(encoding="utf-8"),
                    **yaml.safe_load(record.read_text(encoding="utf-8")),
                )
            )
        except (TypeError, yaml.YAMLError, OSError) as error:
            raise PatchError(f"{record} is damaged: {error}; reinstall dsv4_plugin") from None
    if not found:
        raise PatchError(f"there are no patches in {where}; reinstall dsv4_plugin")
    return found


def host_root() -> Path:
    """Directory of the installed sglang package, which is not imported. Raises PatchError when
    there is none."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise PatchError("SGLang is not installed in this Python; there is nothing to patch")
    return Path(spec.submodule_search_locations[0])


def states() -> dict[str, str]:
    """State of every patch in the installed host."""
    root = host_root()
    return {patch.name: patch.state(root) for patch in patches()}


def write(root: Path, files: dict[str, bytes]) -> None:
    """Puts `files` into the package at `root`: all of them, or none when one cannot be written."""
    with contextlib.ExitStack() as cleanup:
        fresh = {}
        for path, content in files.items():
            handle, name = tempfile.mkstemp(dir=(root / path).parent)
            cleanup.callback(lambda name=name: os.path.exists(name) and os.unlink(name))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, (root / path).stat().st_mode & 0o777)
            fresh[root / path] = name
        for target, name in fresh.items():
            os.replace(name, target)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _side(path: Path, hashes: dict[str, str]) -> str | None:
    try:
        found = _hash(path.read_bytes())
    except OSError:
        return None
    return next((side for side, known in hashes.items() if known == found), None)


def _applied(patch: Patch, root: Path, revert: bool) -> dict[str, bytes]:
    """The files of `patch` in the package at `root` as `git apply` changes copies of them."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in patch.files:
            (Path(scratch) / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, Path(scratch) / path)
        try:
            # -p3 takes b/python/sglang/ from the front of each path
            done = subprocess.run(
                ["git", "apply", "-p3", *(["--reverse"] if revert else []), "-"],
                input=patch.diff.encode(),
                cwd=scratch,
                env=_git_environment(scratch),
                capture_output=True,
            )
        except FileNotFoundError:
            raise PatchError("git is not installed; it is what applies patches") from None
        if done.returncode:
            complaint = done.stderr.decode(errors="replace").strip().splitlines()[-1]
            raise PatchError(
                f"{patch.name}: its .patch file is damaged ({complaint}); reinstall dsv4_plugin"
            )
        return {path: (Path(scratch) / path).read_bytes() for path in patch.files}


def _git_environment(scratch: str) -> dict[str, str]:
    """This process's without what would have git look at a repository, or change ends of lines."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {
        **inherited,
        "GIT_CEILING_DIRECTORIES": str(Path(scratch).parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }


def chosen(names: list[str], known: list[Patch]) -> Iterator[Patch]:
    """The patches of these names, all for none. Raises PatchError for a name that is no patch."""
    by_name = {patch.name: patch for patch in known}
    for name in names or by_name:
        if name not in by_name:
            raise PatchError(f"there is no patch {name!r}; there are {', '.join(by_name)}")
        yield by_name[name]
