"""Launches of shared_expert: FP8 as released and decoded bf16, decode and prefill."""

import importlib.util
from pathlib import Path

import torch
from registry import Case

from dsv4_plugin.kernels.triton.shared_expert import shared_expert

_SPEC = importlib.util.spec_from_file_location(
    "compile_cases_moe", Path(__file__).parent / "moe.py"
)
_MOE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MOE)


def _launch(tokens: int, hidden: int, inner: int, form: str):
    shapes = (inner, hidden), (hidden, inner), (inner, hidden)
    parts = [part for shape in shapes for part in _MOE.weights(form, 1, *shape)]
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta")
    shared_expert(x, *(None if part is None else part[0] for part in parts), 10.0)


CASES = [
    Case(
        name,
        lambda a=shape: _launch(*a),
        matrix={kernel: _MOE.RATE[shape[-1]] for kernel in _MOE.PRODUCTS},
        workgroups={kernel: 2 for kernel in _MOE.PRODUCTS},
        units={"gate_up_kernel": _MOE.units} if shape[-1] != "bf16" else {},
    )
    for name, *shape in (
        ("decode-1/pro-tp8", 1, 7168, 384, "fp8"),
        ("decode-64/pro-tp8", 64, 7168, 384, "fp8"),
        ("prefill-8192/pro-tp8", 8192, 7168, 384, "fp8"),
        ("prefill-8192/bf16", 8192, 7168, 384, "bf16"),
    )
]
