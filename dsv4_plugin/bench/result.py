"""Results in the shape of InferenceX's `process_result.py`, and how much repeated runs differ."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

STABLE = 0.04
"""Runs of one point that differ by more than this share of their median are marked: a figure that
uncertain cannot rank two configurations that are closer."""


def inferencex(figures: Mapping[str, Any], gpus: int) -> dict[str, float]:
    """InferenceX's metrics of one run: tokens/s per GPU, times in seconds, `intvty` = 1/TPOT in
    tokens/s/user.

    mean, median, std, p90, p95 and p99 of ttft, tpot, itl, e2el and intvty. `figures` are the
    client's, in milliseconds. As there, each interactivity is the reciprocal of the TPOT figure of
    the same name, so p99_intvty is that of a slow request.
    """
    made = {
        "tput_per_gpu": figures["total_throughput"] / gpus,
        "output_tput_per_gpu": figures["output_throughput"] / gpus,
        "input_tput_per_gpu": (figures["total_throughput"] - figures["output_throughput"]) / gpus,
    }
    for name, value in figures.items():
        if name.endswith("_ms"):
            metric = name.removesuffix("_ms").replace("e2e_latency", "e2el")
            made[metric] = value / 1000
            if "tpot" in metric and value > 0:
                made[metric.replace("tpot", "intvty")] = 1000 / value
    return made


def spread(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """(largest - smallest) / median over runs, of throughput or of median TPOT, whichever is more;
    None for one run."""
    if len(runs) < 2:
        return None
    shares = []
    for name in ("total_throughput", "median_tpot_ms"):
        values = [run[name] for run in runs]
        shares.append((max(values) - min(values)) / statistics.median(values))
    return max(shares)


def accept_length(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Tokens that a verification of drafts gives, the one after them included: the median of the
    runs and (largest - smallest) / median. None without a draft, and the latter for one run.

    Each run's figure is the server's own at its end, over all requests since the server started.
    """
    lengths = [run["accept_length"] for run in runs if run.get("accept_length")]
    if not lengths:
        return {"accept_length": None, "accept_length_spread": None}
    median = statistics.median(lengths)
    apart = (max(lengths) - min(lengths)) / median if len(lengths) > 1 else None
    return {"accept_length": median, "accept_length_spread": apart}


def middle(runs: Sequence[Mapping[str, Any]]) -> int:
    """Index of the run of median throughput; of two in the middle, the slower."""
    order = sorted(range(len(runs)), key=lambda index: runs[index]["total_throughput"])
    return order[(len(runs) - 1) // 2]
