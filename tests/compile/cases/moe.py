"""Launches of moe: both models, decode to prefill, every form of weights, shares by tensor and by
expert."""

import torch
from registry import ARCHS, Case, Units

from dsv4_plugin.kernels.triton.moe import moe


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def weights(form: str, experts: int, outputs: int, inputs: int):
    """A stack of matrices and its scales."""
    if form == "bf16":
        return _meta(experts, outputs, inputs), None
    if form == "fp4":
        return (
            _meta(experts, outputs, inputs // 2, dtype=torch.int8),
            _meta(experts, outputs, inputs // 32, dtype=torch.float8_e8m0fnu),
        )
    scale = torch.float32 if form == "base" else torch.float8_e8m0fnu
    return (
        _meta(experts, outputs, inputs, dtype=torch.float8_e4m3fn),
        _meta(experts, -(-outputs // 128), -(-inputs // 128), dtype=scale),
    )


def _launch(tokens: int, hidden: int, inner: int, experts: int, form: str):
    moe(
        _meta(tokens, hidden),
        _meta(tokens, 6, dtype=torch.float32),
        _meta(tokens, 6, dtype=torch.int64),
        *weights(form, experts, inner, hidden),
        *weights(form, experts, hidden, inner),
        *weights(form, experts, inner, hidden),
        10.0,
    )


def units(constants) -> Units:
    """Multiply-adds of a pass of gate_up_kernel, in thousands."""
    macs = 2 * constants["BLOCK_M"] * constants["BLOCK_N"] * constants["BLOCK_K"]
    return Units("1024 multiply-adds", macs / 1024, macs=1024)


PRODUCTS = ("gate_up_kernel", "down_kernel")
RATE = {"fp4": "scaled f8f6f4", "base": "f8f6f4", "fp8": "f8f6f4", "bf16": "16-bit"}
SHAPES = [
    # name, tokens, hidden, intermediate, experts, form
    ("decode-1/pro-tp8", 1, 7168, 384, 384, "fp4"),
    ("decode-64/pro-tp8", 64, 7168, 384, 384, "fp4"),
    ("decode-64/pro-ep8", 64, 7168, 3072, 48, "fp4"),
    ("decode-64/flash", 64, 4096, 2048, 256, "fp4"),
    ("prefill-1024/pro-tp8", 1024, 7168, 384, 384, "fp4"),
    ("prefill-8192/pro-tp8", 8192, 7168, 384, 384, "fp4"),
    ("prefill-8192/flash-tp4", 8192, 4096, 512, 256, "fp4"),
    ("decode-64/base", 64, 7168, 384, 384, "base"),
    ("prefill-8192/base", 8192, 7168, 384, 384, "base"),
    ("decode-64/bf16", 64, 4096, 2048, 256, "bf16"),
    ("prefill-8192/bf16", 8192, 4096, 2048, 256, "bf16"),
]
EVERYWHERE = {
    "decode-64/pro-tp8",
    "prefill-8192/pro-tp8",
    "decode-64/base",
    "prefill-8192/base",
    "prefill-8192/bf16",
}
"""Other chips have two tiles a form."""
CASES = [
    Case(
        name,
        lambda a=shape: _launch(*a),
        matrix={kernel: RATE[shape[-1]] for kernel in PRODUCTS},
        workgroups={kernel: 2 for kernel in PRODUCTS},
        archs=ARCHS if name in EVERYWHERE else ("gfx950",),
        # of bf16 LLVM joins two passes into one
        units={"gate_up_kernel": units} if shape[-1] != "bf16" else {},
    )
    for name, *shape in SHAPES
]
