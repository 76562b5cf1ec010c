"""Launches of topk_select."""

import torch
from registry import Case

from dsv4_plugin.kernels.triton.topk_select import topk_select


def _launch(tokens: int, entries: int, topk: int):
    logits = torch.empty(tokens, entries, device="meta")
    topk_select(logits, torch.empty(tokens, dtype=torch.int64, device="meta"), topk)


CASES = [
    Case(name, lambda a=size: _launch(*a))
    for name, size in (
        ("pro/decode-64/8k", (64, 2048, 1024)),
        ("pro/decode-64/32k", (64, 8192, 1024)),
        ("pro/decode-64/64k", (64, 16384, 1024)),
        ("pro/decode-64/1m", (64, 262144, 1024)),
        ("flash/prefill-8192", (8192, 2048, 512)),
    )
]
