"""Goodput: requests a second that keep a service level, each request judged by itself (Zhong et
al., DistServe, OSDI 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.service_levels import SERVICE_LEVELS


def goodput(
    ttfts: Sequence[float], itls: Sequence[Sequence[float]], duration: float
) -> dict[str, float]:
    """Requests a second that kept each of SERVICE_LEVELS, in a run of `duration` seconds.

    `ttfts` and `itls` are seconds to the first token and between further ones, by request. The time
    per token of a request is the mean of its gaps; an answer of one token has none.
    """
    kept = dict.fromkeys(SERVICE_LEVELS, 0)
    for ttft, gaps in zip(ttfts, itls, strict=True):
        tpot = sum(gaps) / len(gaps) if gaps else 0.0
        for name, level in SERVICE_LEVELS.items():
            kept[name] += 1000 * ttft <= level.ttft_ms and 1000 * tpot <= level.tpot_ms
    return {name: count / duration for name, count in kept.items()}


def spelled(figures: Mapping[str, Any]) -> str:
    """Goodput of a result in words, such as "goodput server 1.20, interactive 0.00 requests/s"."""
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in figures.items())
    return f"goodput {rates} requests/s"
