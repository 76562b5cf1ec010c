"""Kernels that Triton compiles while the server serves are counted; those before, and those found
in its cache, are not."""

from __future__ import annotations

import os
import subprocess
import sys

_PROGRAM = """
import logging, sys, types
logging.basicConfig(stream=sys.stdout)
from triton.compiler import ASTSource, compile
from triton.backends.compiler import GPUTarget
import triton, triton.language as tl
from triton import knobs
from dsv4_plugin.host.metrics import CompileCounter
heard = []
knobs.compilation.listener = lambda **event: heard.append(event["cache_hit"])
recorder = types.SimpleNamespace(ready=False)
counter = CompileCounter(recorder)
@triton.jit
def doubled(x, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(x + at, tl.load(x + at) * 2)
def build(n):
    source = ASTSource(doubled, {"x": "*fp32", "n": "constexpr"}, {"n": n})
    compile(source, target=GPUTarget("hip", "gfx950", 64))
build(64); assert counter.count == 0
recorder.ready = True
build(64); assert counter.count == 0, "it is in the cache"
build(128); build(256); assert counter.count == 2
assert heard == [False, True, False, False], heard
"""


def test_compiles_while_serving_are_counted_and_named(tmp_path):
    source = tmp_path / "program.py"  # Triton reads the source of a kernel from its file
    source.write_text(_PROGRAM)
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, source],
        env=clean | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("compiled doubled while serving") == 2
