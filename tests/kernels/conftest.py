"""These tests interpret Triton kernels on the CPU. A process that interprets cannot compile, and the reverse, so they
run on their own: `TRITON_INTERPRET=1 pytest tests/kernels`, or just `pytest tests/kernels`."""

from __future__ import annotations

import os
import sys
import warnings

if "triton" not in sys.modules and any("tests/kernels" in argument for argument in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

collect_ignore_glob = []
if os.environ.get("TRITON_INTERPRET") != "1":
    warnings.warn("tests/kernels need a process of their own: pytest tests/kernels", stacklevel=1)
    collect_ignore_glob = ["test_*.py"]
