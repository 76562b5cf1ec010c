"""The package as pip installs it: recipes, patches and the trained checkpoint come along wherever
it is put, and another package's files of the same names do not take their place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKED = ("dsv4_plugin", "recipes", "patches", "checkpoints", "pyproject.toml", "README.md")
SHOW = """
from dsv4_plugin import installation
for name in ("recipes", "patches", "checkpoints/tiny", "checkpoints/tiny-dspark"):
    print(*sorted(path.name for path in installation.directory(name).iterdir()))
print(installation.__file__)
"""


def run(*words, **options):
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What the build reads, in a directory where it may write."""
    place = tmp_path_factory.mktemp("checkout")
    for name in (*PACKED, "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                place / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
            shutil.copy(ROOT / name, place / name)
    return place


def shown(directory):
    """What the package in `directory` finds, seen from elsewhere and without site-packages'."""
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    *names, file = run("-c", SHOW, cwd="/", env=environment)
    assert Path(file).is_relative_to(directory)
    return names


def present(*names):
    return [" ".join(sorted(path.name for path in (ROOT / name).iterdir())) for name in names]


@pytest.mark.parametrize("kind", ["target", "prefix", "checkout"])
def test_files_come_along(checkout, tmp_path, kind):
    where = {"target": ("--target", str(tmp_path)), "prefix": ("--prefix", str(tmp_path))}
    site = checkout
    if kind != "checkout":
        pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index")
        # With --prefix pip would take the package out of the environment of these tests.
        run(*pip, "--ignore-installed", *where[kind], str(checkout))
        [package] = tmp_path.rglob("dsv4_plugin/installation.py")
        site = package.parents[1]
        # some packages install a top-level directory of this name
        (site / "recipes").mkdir()
        (site / "recipes" / "another.yaml").write_text("name: another\n")
    assert shown(site) == present(
        "recipes", "patches", "checkpoints/tiny", "checkpoints/tiny-dspark"
    )
