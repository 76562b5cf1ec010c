"""The files of a checkpoint: what they hold is known from their headers, before any weight is
read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..config import Geometry
from .schema import TensorSpec, expected_tensors

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
"""The one weight file of a checkpoint without an index; other .safetensors files beside it are not
weights."""


class CheckpointError(ValueError):
    """Weight files that are damaged, incomplete, or of another model than their config.json
    describes."""


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of one tensor; `dtype` is a safetensors name."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class CheckpointFiles:
    """The weight files of a model directory: `model.safetensors`, or the shards that an index
    names.

    `stored` maps each tensor's name to its StoredTensor. Construction reads headers only and raises
    CheckpointError for absent or truncated files, and for an index that disagrees with the files it
    names.
    """

    def __init__(self, model_dir: str | Path):
        self.directory = Path(model_dir)
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is not a directory; give the directory of a DeepSeek-V4"
                " checkpoint"
            )
        index = self.directory / INDEX
        if not index.exists() and not (self.directory / SINGLE).exists():
            raise CheckpointError(
                f"{self.directory} holds neither {INDEX} nor {SINGLE}; "
                "give the directory of a DeepSeek-V4 checkpoint"
            )
        weight_map = _read_index(index) if index.exists() else None
        self.files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
        absent = [file for file in self.files if not (self.directory / file).is_file()]
        if absent:
            raise CheckpointError(
                f"{index} names {few(absent)}, not in {self.directory}; "
                "the download is incomplete, fetch the files again"
            )
        self.stored: dict[str, StoredTensor] = {}
        for file in self.files:
            self._read_header(file)
        if weight_map is not None:
            self._compare_with_index(index, weight_map)

    def _read_header(self, file: str) -> None:
        path = self.directory / file
        try:
            # Opening checks that the header parses and that the file ends where the header says.
            with safe_open(path, framework="np") as opened:
                for name in opened.keys():
                    entry = opened.get_slice(name)
                    if name in self.stored:
                        raise CheckpointError(
                            f"{name} is in both {self.stored[name].file} and {file} "
                            f"of {self.directory}"
                        )
                    self.stored[name] = StoredTensor(
                        file, entry.get_dtype(), tuple(entry.get_shape())
                    )
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is damaged or truncated ({path.stat().st_size} bytes: {error}); "
                "fetch the file again"
            ) from None

    def _compare_with_index(self, index: Path, weight_map: dict[str, str]) -> None:
        found = {name: stored.file for name, stored in self.stored.items()}
        if found == weight_map:
            return
        absent = [
            f"{name} in {file}" for name, file in weight_map.items() if found.get(name) != file
        ]
        unlisted = [f"{name} in {file}" for name, file in found.items() if name not in weight_map]
        raise CheckpointError(
            _listing(
                f"{index} disagrees with the files it names",
                ("not where it says", absent),
                ("not in the index", unlisted),
            )
            + "; fetch the index and the files of one release"
        )

    def check(self, geometry: Geometry) -> None:
        """Raises CheckpointError unless the files hold exactly the tensors of `geometry`, with
        their dtypes and shapes.

        The error counts the offenders of each kind and names the first few. Headers only; no weight
        is read.
        """
        expected = expected_tensors(geometry)
        missing = [name for name in expected if name not in self.stored]
        unexpected = [name for name in self.stored if name not in expected]
        wrong = [
            f"{name} is {stored.dtype} {list(stored.shape)}, not {expected[name].dtype}"
            f" {list(expected[name].shape)}"
            for name, stored in self.stored.items()
            if name in expected and not matches(expected[name], stored.dtype, stored.shape)
        ]
        if missing or unexpected or wrong:
            raise CheckpointError(
                _listing(
                    f"{self.directory} does not hold the weights of the model in its config.json",
                    ("missing", missing),
                    ("unexpected", unexpected),
                    ("wrong", wrong),
                )
                + "; config.json and the weights must be of one release"
            )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, CPU tensor) file by file, in the order of the bytes.

        Tensors are views of the memory-mapped file: a weight that nobody touches is never read, and
        one file's pages are let go when the last of its tensors is.
        """
        for file in self.files:
            with safe_open(self.directory / file, framework="pt") as opened:
                for name in opened.offset_keys():
                    yield name, opened.get_tensor(name)


def matches(spec: TensorSpec, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this dtype (safetensors name) and shape is what `spec` describes."""
    return shape == spec.shape and (dtype == spec.dtype or dtype in spec.other_dtypes)


def few(items: list[str], limit: int = 3) -> str:
    """The first few of `items` and how many more there are."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _listing(what: str, *kinds: tuple[str, list[str]]) -> str:
    return (
        what
        + ": "
        + "; ".join(f"{len(items)} {kind}: {few(items)}" for kind, items in kinds if items)
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("weight_map does not map tensors to files")
        return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not an index of safetensors files: {error!r}; fetch it again"
        ) from None
