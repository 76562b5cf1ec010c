"""How long implementations take on this machine: `dsv4 verify --time` measures and remembers it,
`auto` prefers the faster ones by it.

A file a GPU architecture, beside the reports of servers. Times of another GPU or of other versions
are not used.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path

from . import active, device

Seconds = dict[str, dict[str, dict[str, float]]]
"""By operator, phase and implementation: the same calls for all implementations of one phase."""

_PACKAGES = ("dsv4_plugin", "torch", "triton", "aiter", "flydsl", "tilelang", "sglang")


def path() -> Path:
    """Where the times of this GPU are kept."""
    return active.reports_directory() / f"measured-{device.arch()}.json"


def machine() -> dict[str, str]:
    """What the times depend on: the GPU and the versions of what runs there."""
    import torch

    versions = {name: device.package_version(name) or "absent" for name in _PACKAGES}
    found = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "absent"
    return {"device": found, **versions}


def write(seconds: Seconds) -> Path:
    """Keeps times of this machine in place of those that were; a reader sees the old file or the
    new one."""
    where = path()
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=where.parent, delete=False, suffix=".tmp") as out:
        json.dump({"machine": machine(), "seconds": seconds}, out, indent=1)
    os.replace(out.name, where)
    read.cache_clear()
    return where


@functools.cache
def read() -> tuple[Seconds, str | None]:
    """The times of this machine, none where none were measured; and why a file of times is not
    used, or None."""
    if device.arch() == device.CPU or not path().exists():
        return {}, None
    try:
        kept = json.loads(path().read_text(encoding="utf-8"))
        there, seconds = kept["machine"], kept["seconds"]
        for times in seconds.values():
            for phase in times.values():
                sorted(phase, key=phase.__getitem__)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{path()} holds no times ({error!r}); dsv4 verify --time writes them anew"
    here = machine()
    other = [
        f"{name} {there.get(name)}, here {here[name]}"
        for name in here
        if there.get(name) != here[name]
    ]
    if other:
        return (
            {},
            f"{path()} was measured with {'; '.join(other)}; dsv4 verify --time measures anew",
        )
    return seconds, None


def order(operator: str) -> dict[str, list[str]]:
    """The implementations of `operator` whose times are known, by phase, the fastest first."""
    phases = read()[0].get(operator, {})
    return {phase: sorted(times, key=times.__getitem__) for phase, times in phases.items()}
