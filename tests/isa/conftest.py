"""These tests compile Triton kernels, which a process that interprets them cannot: they are skipped
there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# numpy's matrix products here are small: more threads only wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

collect_ignore_glob = []
if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
else:
    pytest.importorskip("tinygrad", reason="gfx950/ decodes by tinygrad's tables")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN and the largest integers: what a kernel does not write shows."""
    import torch

    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
