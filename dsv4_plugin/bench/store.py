"""Results on disk: a file for each finished point, kept whole or not at all, so that a sweep can be
taken up again."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .client import BenchError


def write_json(path: Path, document: Any) -> None:
    """Writes JSON; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
    os.chmod(fresh, 0o644)
    os.replace(fresh, path)


def writable(path: Path) -> None:
    """Makes the directory of `path`. Raises OSError when a file cannot be written there, before
    hours of work end with that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give a file")
    tempfile.TemporaryFile(dir=path.parent).close()


def begun(directory: Path) -> str:
    """The date of the first result in `directory`, today when there is none: a sweep taken up again
    is still one curve."""
    dates = [time.strftime("%Y-%m-%d")]
    for path in directory.rglob("*.json"):
        try:
            dates.append(json.loads(path.read_text(encoding="utf-8"))["date"])
        except (ValueError, KeyError, TypeError):
            continue
    return min(dates)


class Store:
    """The points of one configuration in one directory.

    `identity` says what was measured, and must not differ between the points of a directory that
    are taken up. A finished point is NAME.json; runs of one that is not finished are in NAME.runs,
    which no report reads.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], again: bool = False):
        self.directory = directory
        self.identity = json.loads(json.dumps(identity))
        self._again = again

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def runs(self, name: str) -> list[dict[str, Any]]:
        """Runs of a point that were made before. Raises BenchError when they are of another
        configuration."""
        for path in () if self._again else (self.path(name), self._unfinished(name)):
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
                identity, runs = document["identity"], document["runs"]
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError):
                raise BenchError(
                    f"{path} is no result of dsv4 bench; give another directory with --out"
                ) from None
            self._compare(identity, path)
            return runs
        return []

    def finished(self, name: str, repeat: int) -> dict[str, Any] | None:
        """The result of a point that has at least `repeat` runs, None when there is none yet."""
        if self._again or not self.path(name).exists() or len(self.runs(name)) < repeat:
            return None
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def keep(self, name: str, runs: list[dict[str, Any]]) -> None:
        """Keeps the runs of a point that is not finished."""
        write_json(self._unfinished(name), {"identity": self.identity, "runs": runs})

    def finish(self, name: str, result: Mapping[str, Any]) -> None:
        """Writes the result of a point and drops its unfinished runs."""
        write_json(self.path(name), {**result, "identity": self.identity})
        self._unfinished(name).unlink(missing_ok=True)

    def _unfinished(self, name: str) -> Path:
        return self.directory / f"{name}.runs"

    def _compare(self, identity: Mapping[str, Any], path: Path) -> None:
        names = sorted(
            name
            for name in {*identity, *self.identity}
            if identity.get(name) != self.identity.get(name)
        )
        if names:
            different = "; ".join(
                f"{name} was {identity.get(name)!r} and is {self.identity.get(name)!r}"
                for name in names
            )
            raise BenchError(
                f"{path} measured something else: {different}. Give another directory with --out,"
                " or --again to replace it"
            )
