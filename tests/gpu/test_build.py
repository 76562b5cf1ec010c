"""Kernels that `dsv4 build` made without a GPU are those that a server on one looks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4_plugin import device
from dsv4_plugin.runtime import precompile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[2]
LOAD = {"chunk": 2048, "requests": 64, "context": 1 << 20}


def output(*words: str, **environment: str) -> str:
    """Of a Python process in the checkout."""
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_a_life_on_the_gpu_compiles_nothing(tmp_path):
    arch = device.arch()
    if arch not in precompile.TARGETS:
        pytest.skip(f"{arch} is not one of {', '.join(precompile.TARGETS)}")
    command = f"-m dsv4_plugin build pro --tp 8 --arch {arch} --json --out {tmp_path}".split()
    for name, value in LOAD.items():
        command += [f"--{name}", str(value)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    built = len(json.loads(output(*command, **hidden))["kernels"])
    life = output("tests/gpu/life.py", json.dumps(LOAD), TRITON_CACHE_DIR=str(tmp_path))
    counted = json.loads(life.splitlines()[-1])
    assert counted["compiled"] == []
    assert built / 2 < counted["found"] <= built
