"""Launches of route: decode and prefill of Pro, decode of Flash from the table."""

import torch
from registry import Case, Units

from dsv4_plugin.kernels.triton.route import route


def _launch(tokens: int, experts: int, hidden: int, hashed: bool):
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    route(
        meta(tokens, hidden),
        meta(experts, hidden),
        None if hashed else meta(experts, dtype=torch.float32),
        meta(129280, 6, dtype=torch.int64) if hashed else None,
        meta(tokens, dtype=torch.int64),
        6,
        2.5,
    )


def _units(constants) -> Units:
    macs = constants["BLOCK_TOKENS"] * constants["BLOCK_EXPERTS"]
    return Units("multiply-add", macs * constants["BLOCK_K"], macs=1)


LOGITS = "router_logits_kernel"
CASES = [
    Case(
        name,
        lambda a=size: _launch(*a),
        matrix={LOGITS: "16-bit"},
        # with few rows LLVM joins two passes into one
        units={LOGITS: _units} if "prefill" in name else {},
        workgroups={LOGITS: 2 if "prefill" in name else 4, "choose_kernel": 8},
    )
    for name, size in (
        ("decode-64/pro", (64, 384, 7168, False)),
        ("decode-64/flash/hash", (64, 256, 4096, True)),
        ("prefill-8192/pro", (8192, 384, 7168, False)),
    )
]
