"""The house has floors: imports only go down, and one floor alone knows the host."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dsv4_plugin

ROOT = Path(dsv4_plugin.__file__).parent
FLOORS = (
    "cli",
    "bench",
    "recipe",
    "roofline",
    "report",
    "accuracy",
    "host",
    "runtime",
    "model",
    "checkpoint",
    "ops",
    "kernels",
    "cache",
)
SOURCES = sorted(ROOT.rglob("*.py"))


def imported_modules(path: Path) -> list[str]:
    """Absolute names of the modules that a file imports, at any depth of its code."""
    package = ("dsv4_plugin", *path.relative_to(ROOT).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            # `from .. import ops` names modules, `from ..ops import mhc` may: both spellings are
            # followed.
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return names


def floor(parts: tuple[str, ...]) -> int:
    """Height of a module of the package: 0 is `cli`, the highest; leaf modules lie below all
    floors."""
    if parts and parts[0] in ("__main__", "__main__.py"):  # the command by another name
        return 0
    return FLOORS.index(parts[0]) if parts and parts[0] in FLOORS else len(FLOORS)


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_executor_is_importable_without_the_plugin():
    files = sorted((ROOT.parent / "gfx950").glob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("dsv4_plugin")], path


def test_every_package_is_a_floor():
    packages = {path.parent.relative_to(ROOT).parts[0] for path in SOURCES if path.parent != ROOT}
    assert packages <= set(FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_imports_go_down(path):
    own = floor(path.relative_to(ROOT).parts)
    upward = [
        name
        for name in imported_modules(path)
        if name.startswith("dsv4_plugin.") and floor(tuple(name.split(".")[1:])) < own
    ]
    assert not upward, f"{identity(path)} imports from a floor above its own"


@pytest.mark.parametrize("path", SOURCES, ids=identity)
def test_only_the_host_floor_knows_sglang(path):
    if path.relative_to(ROOT).parts[0] == "host":
        return
    assert not [name for name in imported_modules(path) if name.split(".")[0] == "sglang"]


def test_the_walk_sees_every_spelling(tmp_path, monkeypatch):
    source = ROOT / "ops" / "imaginary.py"
    text = (
        "import sglang.srt\nfrom ..model import x\nfrom . import y\nfrom .. import host\ndef f():\n"
        "    from ..host.plugin import z\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: text)
    names = imported_modules(source)
    assert {
        "sglang.srt",
        "dsv4_plugin.model",
        "dsv4_plugin.ops",
        "dsv4_plugin.host",
        "dsv4_plugin.host.plugin",
    } <= set(names)
