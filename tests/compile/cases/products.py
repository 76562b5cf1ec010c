"""Launches of block_fp8_linear, linear_fp32 and grouped_output at the shapes of Pro on eight
ranks."""

import torch
from registry import Case, Units

from dsv4_plugin.kernels.triton.block_fp8_linear import block_fp8_linear
from dsv4_plugin.kernels.triton.grouped_output import grouped_output
from dsv4_plugin.kernels.triton.linear_fp32 import linear_fp32

KERNEL = "product_kernel"


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def _packed(rows: int, inputs: int):
    return (
        _empty(rows, inputs, dtype=torch.float8_e4m3fn),
        _empty(rows // 128, inputs // 128, dtype=torch.float8_e8m0fnu),
    )


def _fp8(tokens: int, rows: int, inputs: int, coded: bool, parts: tuple[int, ...] = ()):
    x = _empty(tokens, inputs, dtype=torch.float8_e4m3fn) if coded else _empty(tokens, inputs)
    x_scale = _empty(tokens, inputs // 128, dtype=torch.float32) if coded else None
    block_fp8_linear(x, *_packed(rows, inputs), x_scale, parts)


def _grouped(tokens: int, heads: int, groups: int):
    inputs = heads // groups * 512
    grouped_output(_empty(tokens, heads, 512), *_packed(groups * 1024, inputs), groups, True)


def _units(constants) -> Units:
    count = constants["BLOCK_ROWS"] * constants["BLOCK_TOKENS"] * constants["STEP"]
    return Units("1024 multiply-adds", count / 1024, macs=1024)


def _case(name: str, launch, rate: str, workgroups: int = 2) -> Case:
    return Case(
        name,
        launch,
        matrix={KERNEL: rate},
        units={KERNEL: _units},
        workgroups={KERNEL: workgroups},
    )


CASES = [
    _case("fp8/wq_a+wkv/16-tokens", lambda: _fp8(16, 2048, 7168, True, (1536, 512)), "f8f6f4"),
    _case("fp8/wo_b/16-tokens/bf16-input", lambda: _fp8(16, 7168, 2048, False), "f8f6f4"),
    _case("fp8/wq_a+wkv/8192-tokens", lambda: _fp8(8192, 2048, 7168, True), "f8f6f4", 1),
    _case("grouped/16-tokens", lambda: _grouped(16, 16, 2), "f8f6f4"),
    _case(
        "bf16/c4/16-tokens",
        lambda: linear_fp32(_empty(16, 7168), _empty(2624, 7168), (2048, 512, 64)),
        "16-bit",
    ),
    _case(
        "bf16/c4/8192-tokens",
        lambda: linear_fp32(_empty(8192, 7168), _empty(2624, 7168), (2048, 512, 64)),
        "16-bit",
        1,
    ),
]
