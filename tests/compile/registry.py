"""What is compiled: each file in cases/ lists the launches of one operator as `CASES`.

A case calls the operator's own wrapper with meta tensors, as in

    CASES = [Case("decode/pro-tp8/8-tokens", lambda: sparse_mla(q, window_cache, ...),
    matrix={"_attend": "16-bit"},
                  units={"_attend": lambda c: Units("slot*head", c["BLOCK_K"] * c["BLOCK_H"],
                  macs=1024)})]

and every kernel that the wrapper launches becomes a row of the table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ARCHS = ("gfx950", "gfx942", "sm_90")


@dataclass(frozen=True)
class Units:
    """What one pass of a workgroup through the hot loop works off: `count` units of `name`, `macs`
    multiply-adds each."""

    name: str
    count: float
    macs: float = 0.0


@dataclass(frozen=True)
class Case:
    """One call of an operator's wrapper and what its kernels must compile to."""

    name: str
    launch: Callable[[], Any]
    matrix: Mapping[str, str] = field(default_factory=dict)
    """Rate (chips.Matrix.rate) of every matrix instruction on gfx950, by kernel; a kernel not named
    has none."""
    units: Mapping[str, Callable[[Mapping[str, Any]], Units]] = field(default_factory=dict)
    """Units of a pass from the kernel's compile-time constants, by kernel."""
    workgroups: Mapping[str, int] = field(default_factory=dict)
    """Least number of workgroups a compute unit of gfx950 must hold, by kernel."""
    issue: Mapping[str, float] = field(default_factory=dict)
    """Most issue cycles of a SIMD per unit on gfx950, by kernel."""
    archs: tuple[str, ...] = ARCHS


@cache
def operators() -> dict[str, list[Case]]:
    """Cases of every operator, from the files in cases/."""
    found = {}
    for path in sorted((Path(__file__).parent / "cases").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"compile_cases_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = module.CASES
    return found
