"""What each operator's implementation is worth: the same load with one operator at a time back at
its reference."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import flags
from ..active import Row
from .client import BenchError


@dataclass(frozen=True)
class Worth:
    """One operator: throughput and median TPOT without its implementation, against those with
    it."""

    operator: str
    implementation: str
    tput_per_gpu: float
    median_tpot: float
    """Seconds."""
    throughput_gain: float
    """Throughput with the implementation over throughput without it, less 1."""
    tpot_saved: float
    """Seconds of median TPOT that the implementation saves."""
    certain: bool
    """Whether the gain is larger than what repeated runs of the baseline differ by."""


def candidates(rows: Iterable[Row]) -> dict[str, str]:
    """Operators of which anything but the reference ran, with the implementations that did."""
    ran: dict[str, list[str]] = {}
    for row in rows:
        if (
            row.calls
            and row.implementation != flags.REFERENCE
            and row.implementation not in ran.setdefault(row.operator, [])
        ):
            ran[row.operator].append(row.implementation)
    return {operator: ", ".join(names) for operator, names in ran.items() if names}


def without(operator: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which `operator` runs its reference in all layers. Raises FlagError when
    another variable insists."""
    changed = {
        name: value for name, value in environment.items() if name != flags.layers_flag(operator)
    }
    changed[flags.operator_flag(operator)] = flags.REFERENCE
    flags.check(changed)
    return changed


def chosen(asked: Sequence[str], running: Mapping[str, str]) -> list[str]:
    """The operators to turn back: those asked for, or all that run something else than their
    reference.

    Raises BenchError for one that does not exist or runs its reference already, and when there is
    nothing to turn back.
    """
    for operator in asked:
        if operator not in flags.OPERATORS:
            raise BenchError(
                f"there is no operator {operator!r}; there are {', '.join(flags.OPERATORS)}"
            )
        if operator not in running:
            raise BenchError(
                f"{operator} runs its reference already; "
                + (
                    f"{', '.join(running)} can be turned back"
                    if running
                    else "so does every operator of this server, so there is nothing to ablate"
                )
            )
    if not running:
        raise BenchError(
            "every operator of this server runs its reference, so there is nothing to ablate"
        )
    return list(asked) or list(running)


def ablate(
    measure: Callable[[str | None], Mapping[str, Any]],
    operators: Sequence[str],
    running: Mapping[str, str],
    baseline: Mapping[str, Any],
) -> tuple[list[Worth], float]:
    """The worth of every operator, most first, and the share by which the baseline differs from
    itself.

    `measure(operator)` gives the result with that operator back at its reference, or the baseline's
    once more for None: a machine that drifts while the operators are measured shows in it.
    """
    results = {operator: measure(operator) for operator in operators}
    again = measure(None)
    whole = [baseline["tput_per_gpu"], again["tput_per_gpu"]]
    noise = max(
        abs(whole[0] - whole[1]) / statistics.mean(whole),
        *(result["spread"] or 0.0 for result in (baseline, again, *results.values())),
    )
    tput, tpot = (
        statistics.mean(whole),
        statistics.mean([baseline["median_tpot"], again["median_tpot"]]),
    )
    worths = [
        Worth(
            operator,
            running[operator],
            result["tput_per_gpu"],
            result["median_tpot"],
            tput / result["tput_per_gpu"] - 1,
            result["median_tpot"] - tpot,
            abs(tput / result["tput_per_gpu"] - 1) > noise,
        )
        for operator, result in results.items()
    ]
    return sorted(worths, key=lambda worth: worth.throughput_gain, reverse=True), noise
