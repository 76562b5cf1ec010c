"""Triton's key of a kernel, made the same in every process.

Triton 3.6 and older put the constants of a function that a kernel calls into the kernel's key only
where that function's own key is known already. So the key follows from what the process compiled
before, and a kernel that `dsv4 build` compiled would not be found by a server.
"""

from __future__ import annotations

from typing import Any

from triton.runtime.jit import DependenciesFinder


def settle() -> None:
    """Has this process find the key of a called function before that of its caller, always."""
    add = getattr(DependenciesFinder, "_update_hash", None)
    if add is None or getattr(add, "callee_first", False):
        return

    def add_callee(finder: DependenciesFinder, callee: Any) -> None:
        _ = callee.cache_key
        add(finder, callee)

    add_callee.callee_first = True
    DependenciesFinder._update_hash = add_callee
