"""A short soak: mixed traffic against answers recorded alone, and a rank that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_a_short_soak(tmp_path):
    out = tmp_path / "soak.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--out", str(out)]
        + ["--requests", "60", "--seconds", "120", "--rounds", "2", "--streams", "16"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert not found["faults"]
    for row in found["rounds"]:
        assert row["right"] == row["requests"] > 0 and row["tokens in use after"] == 0
    assert "was ended by SIGKILL" in found["rank 1 of 2 killed"]["the log"]
