"""The tests of FlyDSL's kernels, in a process of their own: SGLang's packages load the CUTLASS DSL,
and its MLIR beside FlyDSL's aborts the process that loads both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_plugin import device

ROOT = Path(__file__).parents[2]
TESTS = "tests/isa/flydsl_machine_code.py"


@pytest.mark.skipif(
    device.package_version("flydsl") is None,
    reason="FlyDSL is not installed: pip install 'dsv4_plugin[flydsl]'",
)
def test_machine_code_in_a_process_of_its_own():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and " passed" in ended.stdout, ended.stdout + ended.stderr


def test_sglang_beside_it_is_refused_in_a_sentence():
    """SGLang's own import of the CUTLASS DSL, where its wheel's requirements are installed."""
    pytest.importorskip("sglang")
    if device.package_version("nvidia-cutlass-dsl") is None:
        pytest.skip("nvidia-cutlass-dsl is not installed")
    program = "import sglang.srt.configs.model_config\nimport dsv4_plugin.kernels.flydsl.moe"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1, ended.stderr  # 134 is an abort
    assert ended.stderr.splitlines()[-1].startswith("ImportError: this process loaded nvidia-cut")
