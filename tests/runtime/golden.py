"""How far logits are from the golden answers (tests/data/golden/README.md)."""

from __future__ import annotations

import torch

# Two fp32 implementations of the golden set differ by mean 2.4e-6 and max 2.4e-5 (its README). 4
# times that leaves room for another CPU's order of sums; the smallest deliberate mistake in the
# README's list is 2.4e-2.
EXACT_MEAN, EXACT_MAX = 1e-5, 1e-4

# Two implementations of the same roundings differ by mean 1.13e-2 and median 2.8e-3 over all
# sequences, because fp32 noise flips single roundings (README, "plain float64 vs reference, sim").
# One of the two is float64; two fp32 ones may each be as far from the truth, hence twice. Leaving
# out a rounding costs more (test_mistakes).
OFFICIAL_MEAN, OFFICIAL_MEDIAN = 2 * 1.13e-2, 2 * 2.81e-3

# What two runs that round at the same places, but not the same last bits, differ by: the README's
# "bf16 + KV/indexer sim vs sim".
SERVING_MEAN = 1.09e-1


def ids(golden, k: int) -> list[int]:
    return golden[f"input_ids_{k}"].tolist()


def differences(golden, k: int, logits: torch.Tensor, name: str) -> torch.Tensor:
    """|Δlogprob| at the stored positions whose next token is known."""
    positions = golden[f"positions_{k}"]
    positions, known = positions[positions + 1 < len(logits)], positions + 1 < len(logits)
    want = golden[f"{name}_{k}"][known].log_softmax(-1)
    following = golden[f"input_ids_{k}"][positions + 1].unsqueeze(-1)
    return (logits[positions].log_softmax(-1) - want).gather(1, following).squeeze(-1).abs()


def show(what: str, d: torch.Tensor) -> None:
    print(
        f"{what}: mean {d.mean():.2e} median {d.median():.2e} p99 {d.quantile(0.99):.2e} max"
        f" {d.max():.2e}"
    )
