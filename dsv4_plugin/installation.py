"""Directories of files that belong to the package: recipes, patches, checkpoints."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def directory(name: str) -> Path:
    """Where the files of `name` are: in this package, however it was installed. In a checkout
    `data/` holds links to the repository's own directories."""
    return Path(str(resources.files(__package__) / "data" / name))
