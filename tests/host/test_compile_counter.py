"""Kernels that Triton loads and compiles are counted, and those compiled while the server serves
named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import logging, os, sys, types
logging.basicConfig(stream=sys.stdout)
from triton.compiler import ASTSource, compile
from triton.backends.compiler import GPUTarget
import triton, triton.language as tl
from triton import knobs
from dsv4_plugin.host import metrics
from dsv4_plugin.host.metrics import KernelCounter
metrics._built_ahead = lambda: 7  # it asks the server for its arguments
heard = []
knobs.compilation.listener = lambda **event: heard.append(event["cache_hit"])
recorder = types.SimpleNamespace(ready=False)
counter = KernelCounter(recorder)
@triton.jit
def doubled(x, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(x + at, tl.load(x + at) * 2)
def build(n):
    source = ASTSource(doubled, {"x": "*fp32", "n": "constexpr"}, {"n": n})
    compile(source, target=GPUTarget("hip", "gfx950", 64))
build(64); assert (counter.loaded, counter.compiled, counter.late) == (0, 1, [])
recorder.ready = True
build(64); assert (counter.loaded, counter.compiled, counter.late) == (1, 1, [])
build(128); build(256); assert (counter.loaded, counter.compiled) == (1, 3)
assert [each.split()[0] for each in counter.late] == ["doubled", "doubled"]
facts = counter.facts()
assert facts["kernels"] | {"seconds of compiling": 0} == {
    "built ahead": 7, "loaded": 1, "compiled": 3, "seconds of compiling": 0}
assert 0 < facts["kernels"]["seconds of compiling"] < 300
assert facts["compiled after ready"] == 2
said = facts.get("a fault of dsv4_plugin", "")
assert said.count("doubled (") == (2 if os.environ["DSV4_STRICT"] == "1" else 0), said
assert heard == [False, True, False, False], heard
"""


@pytest.mark.parametrize("strict", ["0", "1"])
def test_kernels_are_counted_and_late_ones_named(tmp_path, strict):
    source = tmp_path / "program.py"  # Triton reads the source of a kernel from its file
    source.write_text(_PROGRAM)
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, source],
        env=clean | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "DSV4_STRICT": strict},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("compiled doubled in ") == ran.stdout.count("while serving") == 2
