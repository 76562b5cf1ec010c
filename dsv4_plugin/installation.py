"""Directories that belong to the package and lie beside it: recipes, patches, checkpoints."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def directory(name: str) -> Path:
    """Where the directory `name` is: beside the package in a checkout, under share/dsv4_plugin in
    an installation."""
    checkout = Path(__file__).parents[1] / name
    return (
        checkout
        if checkout.is_dir()
        else Path(sysconfig.get_path("data"), "share", "dsv4_plugin", name)
    )
