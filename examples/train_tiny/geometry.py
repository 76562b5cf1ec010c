"""Sizes of the trained checkpoint: every mechanism of DeepSeek-V4, as small as learns the tasks on
two cores."""

from __future__ import annotations

from typing import Any

from dsv4_plugin.checkpoint.tiny import tiny_config

VOCAB_SIZE = 2048


def config() -> dict[str, Any]:
    """config.json: a window layer, a ratio-128 layer, a ratio-4 layer with an indexer, and an MTP
    block."""
    return tiny_config(
        layers=3,
        hidden=128,
        experts=8,
        experts_per_token=2,
        heads=2,
        o_groups=2,
        intermediate=128,
        index_topk=64,
        compress_ratios=(0, 128, 4),
        mtp_blocks=1,
        max_length=16384,
    ) | {
        "vocab_size": VOCAB_SIZE,
        "index_n_heads": 8,
        "num_hash_layers": 1,
        # Of a size that a small model's activations reach, so that the clamp is a part of what it
        # learns.
        "swiglu_limit": 2.0,
    }
