"""Built kernels as a wheel: the archive of a build as the one file of a package. Where it is
installed, `dsv4 serve` takes the archive in before it compiles anything.

The wheel names its archive by an entry point, so that finding it imports nothing.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

from .kernel_cache import Manifest, pack

GROUP = "dsv4_plugin.kernels"
_METADATA = """Metadata-Version: 2.1
Name: {name}
Version: {version}
Summary: Kernels that dsv4_plugin {version} compiled for {model} on {arch}, tp {tp}, ep {ep}
"""
_WHEEL = """Wheel-Version: 1.0
Generator: dsv4_plugin {version}
Root-Is-Purelib: true
Tag: py3-none-any
"""


def write(manifest: Manifest, cache: Path, folder: Path) -> Path:
    """The wheel of a build, in `folder`, whole or not at all.

    Raises BuildError where a kernel is not as it was built.
    """
    name, version = _package(manifest), manifest.versions["dsv4_plugin"]
    facts = {"name": name, "version": version, "model": manifest.model} | {
        key: getattr(manifest, key) for key in ("arch", "tp", "ep")
    }
    information = f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        archive, whole = Path(temporary) / "kernels.tar.gz", Path(temporary) / "wheel"
        pack([manifest], cache, archive)
        members = {
            f"{name}/kernels.tar.gz": archive.read_bytes(),
            f"{information}/METADATA": _METADATA.format(**facts).encode(),
            f"{information}/WHEEL": _WHEEL.format(**facts).encode(),
            f"{information}/entry_points.txt": f"[{GROUP}]\n{manifest.name} = {name}\n".encode(),
        }
        record = f"{information}/RECORD"
        lines = [f"{path},{_digest(content)},{len(content)}" for path, content in members.items()]
        with zipfile.ZipFile(whole, "w") as out:
            for path, content in members.items():
                out.writestr(path, content)
            out.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n")
        path = folder / f"{name}-{version}-py3-none-any.whl"
        os.replace(whole, path)
    return path


def _package(manifest: Manifest) -> str:
    words = ("dsv4_kernels", manifest.model, manifest.arch, f"tp{manifest.tp}", f"ep{manifest.ep}")
    return re.sub(r"\W+", "_", "_".join(words)).lower()


def _digest(content: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
    return f"sha256={digest.rstrip('=')}"


def installed(manifest: Manifest) -> Path | None:
    """The archive of a build for this server that an installed wheel brings, or None."""
    for found in entry_points(group=GROUP, name=manifest.name):
        return Path(found.dist.locate_file(f"{found.value}/kernels.tar.gz"))
    return None
