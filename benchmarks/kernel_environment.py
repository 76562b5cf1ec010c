"""Where a kernel benchmark ran."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin import device as facts
from dsv4_plugin.bench.environment import commit

_ROOT = Path(__file__).parents[1]


def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date; "unknown" for what this machine does not tell."""
    found = {"device": "cpu", "arch": facts.arch(), "compute_units": None, "memory_gb": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "compute_units": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
    return found | {
        "driver": _driver(device),
        "torch": torch.__version__,
        "triton": facts.package_version("triton"),
        "dsv4_plugin": _version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return "no driver"
    if torch.version.hip:
        try:
            driver = Path("/sys/module/amdgpu/version").read_text().strip()
        except OSError:
            driver = "of the kernel"
        return f"ROCm {torch.version.hip}, amdgpu {driver}"
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        driver = asked.stdout.split("\n")[0].strip() or "unknown"
    except OSError:
        driver = "unknown"
    return f"CUDA {torch.version.cuda}, driver {driver}"


def _version() -> str:
    """Of this checkout, which may not be installed."""
    found = re.search(r'^version = "(.+)"', (_ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


def _commit() -> str:
    try:
        return commit()
    except importlib.metadata.PackageNotFoundError:  # neither a git checkout nor installed
        return "unknown"
