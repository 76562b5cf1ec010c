"""These tests run kernels: on a GPU where there is one, else interpreted on the CPU. A process that
interprets cannot compile, and the reverse, so they run on their own: `pytest tests/kernels`.

On a GPU only the files that take their kernels from `devices.py` are collected; the others call
launchers on tensors of the CPU.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

if (
    not torch.cuda.is_available()
    and "triton" not in sys.modules
    and any("tests/kernels" in argument for argument in sys.argv)
):
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore_glob = []
if os.environ.get("TRITON_INTERPRET") != "1":
    if not torch.cuda.is_available():
        warnings.warn(
            "tests/kernels need a process of their own: pytest tests/kernels", stacklevel=1
        )
    collect_ignore_glob = [
        path.name
        for path in Path(__file__).parent.glob("test_*.py")
        if not torch.cuda.is_available() or "from devices import" not in path.read_text()
    ]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN and the largest integers: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def sums_in_order(monkeypatch):
    """The interpreter's products add their terms one after the other, as a matrix instruction's
    order does not depend on the tile: the BLAS behind numpy chooses one by shape and processor."""
    if torch.cuda.is_available():
        return
    import numpy as np

    def matmul(left, right, dtype=None):
        dtype = dtype or np.result_type(left, right)
        total = np.zeros((left.shape[0], right.shape[1]), dtype)
        for column, row in zip(left.T.astype(dtype), right.astype(dtype)):
            total += np.outer(column, row)
        return total

    monkeypatch.setattr(np, "matmul", matmul)
