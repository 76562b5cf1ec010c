"""The largest rate of Poisson arrivals at which the 99th percentiles of TTFT and TPOT stay within
bounds (MLPerf's server scenario)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .client import BenchError, Load
from .store import Store
from .sweep import Bench

TOLERANCE = 0.05
"""Bisection ends when the smallest rate that failed is within this share of the largest that
passed."""
_MOST = 16
"""Trials at most: from a start that is wrong by 2^9 there remain six halvings, finer than the
tolerance needs."""
_ALONE = 0.5
"""Mean requests in flight below which a request is alone most of its time."""
_ARRIVING = 0.1
"""Share of a run in which requests must still arrive for their rate to matter."""
_CERTAIN = 100
"""Below this many requests the 99th percentile is an interpolation towards the slowest one."""


@dataclass(frozen=True)
class SLO:
    """What the 99th percentile may be, in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def __post_init__(self):
        for name, value in (("--ttft-ms", self.ttft_ms), ("--tpot-ms", self.tpot_ms)):
            if not value > 0:
                raise BenchError(f"{name} is {value:g}; it must be above 0")

    def name(self, prompts: int) -> str:
        """Stem of the file that holds the result of a search with `prompts` requests a trial."""
        return f"poisson-{prompts}-ttft-{self.ttft_ms:g}-tpot-{self.tpot_ms:g}"

    def keep(self, figures: Mapping[str, Any]) -> bool:
        return figures["p99_ttft_ms"] <= self.ttft_ms and figures["p99_tpot_ms"] <= self.tpot_ms


def largest_rate(
    passes: Callable[[float], bool], start: float, tolerance: float = TOLERANCE, most: int = _MOST
) -> float | None:
    """The largest rate found to pass, by doubling or halving from `start` and then bisecting the
    logarithm of the rate.

    None when none passed. Takes it that a rate above one that failed fails.
    """
    good, bad, rate = 0.0, math.inf, start
    for _ in range(most):
        if passes(rate):
            good = rate
        else:
            bad = rate
        if bad <= good * (1 + tolerance):
            break
        rate = rate * 2 if math.isinf(bad) else bad / 2 if not good else math.sqrt(good * bad)
    return good or None


def search(bench: Bench, slo: SLO, start: float, prompts: int, store: Store) -> dict[str, Any]:
    """The result at the largest rate that keeps the bounds, with all trials. A rate tried before is
    not run again.

    Trials of `prompts` requests do not depend on the bounds and serve every search in the store's
    directory. Raises BenchError when no rate tried keeps the bounds, or when a trial cannot tell.
    """
    kept = f"poisson-{prompts}"
    trials: dict[float, dict[str, Any]] = {trial["rate"]: trial for trial in store.runs(kept)}

    def passes(rate: float) -> bool:
        if rate not in trials:
            load = Load.poisson(rate, prompts)
            bench.progress.point(load, "")
            trials[rate] = {**bench.run(load), "rate": rate}
            store.keep(kept, list(trials.values()))
        _check_meaning(rate, prompts, trials[rate]["figures"], slo)
        return slo.keep(trials[rate]["figures"])

    rate = largest_rate(passes, start)
    if rate is None:
        raise BenchError(
            f"no rate down to {min(trials):.3g} requests/s keeps the 99th percentile of TTFT within"
            f" {slo.ttft_ms:g} ms and of TPOT within {slo.tpot_ms:g} ms"
        )
    result = bench.result(
        Load.poisson(rate, prompts),
        [trials[rate]],
        request_rate=rate,
        bounds=asdict(slo),
        trials=_rows(trials.values(), slo),
    )
    if prompts < _CERTAIN:
        result["warnings"].append(
            f"the 99th percentile of {prompts} requests is little more than the slowest one; "
            f"give --prompts {_CERTAIN} or more"
        )
    store.finish(slo.name(prompts), result)
    return result


def _check_meaning(rate: float, prompts: int, figures: Mapping[str, Any], slo: SLO) -> None:
    """Raises BenchError for a trial from which no other rate could be found: its requests never
    met, or met all at once."""
    if slo.keep(figures):
        if prompts / rate < _ARRIVING * figures["duration"]:
            raise BenchError(
                f"at {rate:.3g} requests/s all {prompts} arrive in {prompts / rate:.2g} s of a run"
                f" of {figures['duration']:.2g} s and the bounds are kept: a higher rate would be"
                " the same load. Give more --prompts, or tighter bounds"
            )
    elif figures["concurrency"] < _ALONE:
        raise BenchError(
            f"no rate keeps the bounds: at {rate:.3g} requests/s requests hardly overlap, and the"
            f" 99th percentile of TTFT is {figures['p99_ttft_ms']:.4g} ms (bound"
            f" {slo.ttft_ms:g}) and of TPOT {figures['p99_tpot_ms']:.4g} ms (bound"
            f" {slo.tpot_ms:g})"
        )


def _rows(trials: Iterable[Mapping[str, Any]], slo: SLO) -> list[dict[str, Any]]:
    return [
        {
            "rate": trial["rate"],
            "p99_ttft_ms": trial["figures"]["p99_ttft_ms"],
            "p99_tpot_ms": trial["figures"]["p99_tpot_ms"],
            "keeps_bounds": slo.keep(trial["figures"]),
        }
        for trial in sorted(trials, key=lambda trial: trial["rate"])
    ]
