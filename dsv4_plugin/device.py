"""Facts of the device this process runs on."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from pathlib import Path

CPU = "cpu"


@functools.cache
def arch() -> str:
    """ "gfx950", "gfx942", "sm_90", … of the first visible GPU, or "cpu"."""
    import torch

    if not torch.cuda.is_available():
        return CPU
    properties = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def lacks_fp8() -> str | None:
    """Why kernels of this GPU cannot convert to and from FP8 e4m3, or None. Triton has that for
    every AMD GPU."""
    found = arch()
    if found.startswith("sm_") and int(found[3:]) < 89:
        return f"{found} has no FP8 e4m3; sm_89 and later have"
    return None


def memory() -> int:
    """Bytes of memory of the first visible GPU, or of the machine when there is none."""
    if arch() == CPU:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def interprets_triton() -> bool:
    """Whether Triton kernels run interpreted on the CPU in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def package_version(name: str) -> str | None:
    """Installed version of a distribution or importable package, None when absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(name) else None


def host_caches() -> Path:
    """The folder where SGLang has compilers keep what they compile, each in a folder of its name,
    whose own variable is not set (`third_party_cache_defaults` in its environ.py)."""
    return Path(os.environ.get("SGLANG_CACHE_DIR") or "~/.cache/sglang").expanduser().absolute()
