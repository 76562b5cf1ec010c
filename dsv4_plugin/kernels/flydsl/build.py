"""FlyDSL kernels compiled for a GPU that need not be here, into the cache where FlyDSL looks for
them.

This module does not import FlyDSL, which reads its environment when it is imported.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

_LINKER = """#!{python}
import sys
from triton._C.libtriton import amd
words = sys.argv[1:]
out = words[words.index("-o") + 1]
(given,) = (word for word in words if not word.startswith("-") and word != out)
amd.link_hsaco(given, out)
"""
"""What FlyDSL calls as ROCm's linker: the one in Triton's wheel."""


def compile_only(arch: str, cache: Path | None = None) -> None:
    """Makes FlyDSL, which this process has not imported yet, compile for `arch` and launch nothing,
    with no ROCm. It keeps what it compiles in `cache`, or nowhere."""
    root = Path(tempfile.mkdtemp(prefix="flydsl-rocm-"))
    linker = root / "llvm" / "bin" / "ld.lld"
    linker.parent.mkdir(parents=True)
    linker.write_text(_LINKER.format(python=sys.executable))
    linker.chmod(0o755)
    os.environ.update(
        ROCM_PATH=str(root),
        ARCH=arch,
        FLYDSL_GPU_ARCH=arch,  # what its helpers ask, which do not read ARCH
        COMPILE_ONLY="1",
        FLYDSL_RUNTIME_ENABLE_CACHE=str(int(cache is not None)),
    )
    if cache is not None:
        os.environ["FLYDSL_RUNTIME_CACHE_DIR"] = str(cache)


def compiled(launcher: Any, **arguments: Any) -> tuple[Path, bytes]:
    """(the file of a variant in the cache, compiled or found there, its machine code among other
    things). Tensors among the `arguments` say dtype and dimensions, and may be empty."""
    launcher(**arguments)
    key, artifact = next(reversed(launcher._mem_cache.items()))
    path = launcher.cache_manager._cache_file(launcher._cache_key_to_str(key))
    # MLIR writes what is not printable as a backslash and two hexadecimal digits
    code = re.sub(
        rb"\\([0-9A-F]{2})",
        lambda byte: bytes.fromhex(byte[1].decode()),
        artifact._ir_text.encode(),
    )
    return path, code
