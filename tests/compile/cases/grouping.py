"""Launches of moe's grouping by expert: decode, prefill, and the experts of one of eight ranks."""

import torch
from registry import Case

from dsv4_plugin.kernels.triton.grouping import group_by_expert


def _launch(tokens: int, first: int, experts: int, block: int):
    chosen = torch.empty(tokens, 6, dtype=torch.int64, device="meta")
    group_by_expert(chosen, first, experts, block)


CASES = [
    Case(name, lambda a=size: _launch(*a), workgroups={"group_kernel": 2})
    for name, size in (
        ("decode-64/pro", (64, 0, 384, 16)),
        ("prefill-8192/pro", (8192, 0, 384, 128)),
        ("prefill-8192/pro-ep8", (8192, 96, 48, 128)),
    )
]
