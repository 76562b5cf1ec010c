"""Launches of indexer_logits."""

import torch
from registry import Case, Units

from dsv4_plugin.cache import PackedIndexCache, index_page_bytes
from dsv4_plugin.cache.step_plan import StepPlan
from dsv4_plugin.kernels.triton.indexer_logits import indexer_logits

HEADS = 64


def _launch(tokens: int, requests: int, max_seq_len: int):
    def numbers(*shape: int):
        return torch.empty(*shape, dtype=torch.int64, device="meta")

    plan = StepPlan(
        numbers(tokens),
        numbers(tokens),
        numbers(tokens),
        tokens // requests,
        max_seq_len,
        numbers(tokens),
        numbers(tokens, 128),
        numbers(requests, -(-max_seq_len // 256)),
        {},
    )
    cache = PackedIndexCache(
        torch.empty(300000, index_page_bytes(), dtype=torch.uint8, device="meta")
    )
    indexer_logits(
        torch.empty(tokens, HEADS, 128, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(tokens, HEADS, device="meta"),
        cache,
        plan,
    )


def _units(constants) -> Units:
    return Units("logit", constants["BLOCK_KEYS"] * constants["QUERIES"], macs=HEADS * 128)


# A logit of 64 heads is 8192 multiply-adds, 2.0 cycles of a SIMD at the rate of FP8, and 3.0 cycles
# of relu, weights and sums. Two waves a SIMD run each other's part meanwhile; both in a row are
# 5.0.
ISSUE = 5.1
KERNEL = "indexer_logits_kernel"
CASES = [
    Case(
        name,
        lambda a=size: _launch(*a),
        matrix={KERNEL: "f8f6f4"},
        units={KERNEL: _units},
        workgroups={KERNEL: 4},
        issue={KERNEL: ISSUE},
    )
    for name, size in (("decode-64/128k", (64, 64, 131072)), ("prefill-8192", (8192, 4, 8192)))
]
