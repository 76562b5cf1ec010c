"""Where the cases of this directory run: interpreted on the CPU, or on the GPU that is there.

A case makes its data on the CPU, where the reference runs too; `kernel` carries the arguments to
the device and brings back what the kernel returned and wrote.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv4_plugin.ops.operator import Operator
from dsv4_plugin.runtime.elsewhere import Elsewhere

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = CPU if INTERPRETED else torch.device("cuda")
CARRIED = not INTERPRETED or os.environ.get("DSV4_TEST_CARRIED") == "1"
"""Whether arguments are copied for the kernel; DSV4_TEST_CARRIED=1 does it on the CPU too, to try
the copying where there is no GPU."""

interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="sets what a GPU decides itself")


def on_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` on DEVICE, for arguments and results on the CPU."""

    def carried(*args: Any, **kwargs: Any) -> Any:
        there = Elsewhere(DEVICE)
        args, kwargs = there((args, kwargs))
        result = run(*args, **kwargs)
        there.bring_back()
        return Elsewhere(CPU)(result)

    return carried if CARRIED else run


def kernel(operator: Operator, name: str = "triton") -> Callable[..., Any]:
    """The implementation of `operator`; the test is skipped where it does not run."""
    implementation = operator.implementations[name]
    if reason := implementation.unavailable():
        pytest.skip(reason)
    return on_device(implementation.load())


def either(interpreted: float, gpu: float) -> float:
    """A bound that is wider where the GPU's own instructions round."""
    return interpreted if INTERPRETED else gpu
