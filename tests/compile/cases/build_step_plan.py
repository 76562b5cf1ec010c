"""Launches of build_step_plan."""

import torch
from registry import Case

from dsv4_plugin.kernels.triton.step_plan import build_step_plan


def _launch(tokens: int, requests: int, max_seq_len: int):
    def numbers(*shape: int, dtype=torch.int64):
        return torch.empty(*shape, dtype=dtype, device="meta")

    build_step_plan(
        numbers(tokens),
        numbers(tokens),
        numbers(tokens),
        numbers(requests),
        numbers(requests),
        numbers(4096, 1 << 20, dtype=torch.int32),
        numbers(requests),
        numbers(1 << 24),
        tokens // requests,
        max_seq_len,
    )


CASES = [
    Case("decode-64/128k", lambda: _launch(64, 64, 131072)),
    Case("prefill-8192", lambda: _launch(8192, 4, 8192)),
]
