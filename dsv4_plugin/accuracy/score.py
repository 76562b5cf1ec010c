"""Accuracy of a running server: scores by item, thresholds, and the difference of two servers with
its standard error."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class EvalError(ValueError):
    """An evaluation that cannot run, or results that cannot be compared."""


@dataclass(frozen=True)
class Score:
    """Result of one task: the value of every item, 0 or 1, by an id that is the same on every
    server."""

    task: str
    metric: str
    items: Mapping[str, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.items.values())

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean over items; None for a single one."""
        return _stderr(list(self.items.values()))

    def document(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "metric": self.metric,
            "score": self.mean,
            "stderr": self.stderr,
            "count": len(self.items),
            "items": dict(self.items),
        }


@dataclass(frozen=True)
class Difference:
    """Mean of one server's items less the other's, and the standard error of that mean.

    Items are compared one by one: what is hard for both servers does not widen the error.
    """

    task: str
    mean: float
    stderr: float | None
    better: int
    """Items that only the first server answered."""
    worse: int

    def significant(self, standard_errors: float) -> bool:
        """Whether the first server is worse by more than so many standard errors."""
        return self.mean < 0 and -self.mean > standard_errors * (self.stderr or 0.0)


def difference(first: Score, second: Score) -> Difference:
    """Raises EvalError when the two answered different items."""
    if (first.task, first.metric, first.items.keys()) != (
        second.task,
        second.metric,
        second.items.keys(),
    ):
        raise EvalError(
            f"{first.task} ({first.metric}, {len(first.items)} items) and {second.task}"
            f" ({second.metric}, {len(second.items)} items) are not the same questions; evaluate"
            " both with the same data and --limit"
        )
    apart = [first.items[item] - second.items[item] for item in first.items]
    return Difference(
        first.task,
        statistics.fmean(apart),
        _stderr(apart),
        sum(each > 0 for each in apart),
        sum(each < 0 for each in apart),
    )


def _stderr(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def read_scores(path: Path) -> list[Score]:
    """Scores of a file that `dsv4 eval --out` wrote. Raises EvalError for any other file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [
            Score(entry["task"], entry["metric"], entry["items"]) for entry in document["scores"]
        ]
    except (ValueError, KeyError, TypeError):
        raise EvalError(f"{path} is no result of dsv4 eval") from None
