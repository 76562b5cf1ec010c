"""These tests interpret Triton kernels on the CPU. A process that interprets cannot compile, and
the reverse, so they run on their own: `TRITON_INTERPRET=1 pytest tests/kernels`, or just `pytest
tests/kernels`."""

from __future__ import annotations

import os
import sys
import warnings

import pytest

if "triton" not in sys.modules and any("tests/kernels" in argument for argument in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore_glob = []
if os.environ.get("TRITON_INTERPRET") != "1":
    warnings.warn("tests/kernels need a process of their own: pytest tests/kernels", stacklevel=1)
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN and the largest integers: what a kernel does not write shows."""
    import torch

    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
