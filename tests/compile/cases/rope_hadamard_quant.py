"""Launches of rope_hadamard_quant."""

import torch
from registry import Case

from dsv4_plugin.kernels.triton.rope_hadamard_quant import rope_hadamard_quant


def _launch(tokens: int):
    turn = torch.empty(tokens, 32, device="meta")
    rope_hadamard_quant(
        torch.empty(tokens, 64, 128, dtype=torch.bfloat16, device="meta"),
        torch.empty(tokens, 64, device="meta"),
        turn,
        turn,
        "fp8",
    )


CASES = [
    Case(
        "64-tokens",
        lambda: _launch(64),
        matrix={"rope_hadamard_quant_kernel": "16-bit"},
        workgroups={"rope_hadamard_quant_kernel": 4},
    )
]
