"""Figures compared between curves: throughput at matched interactivity, gains, costs, and the
article's own cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from .cost import CostTable, dollars_per_million
from .curves import Curve, PublishedTable

AGREEMENT = 0.01
"""Relative difference within which an interpolated cell is called equal to the article's: it prints
integers, so its own rounding is up to half a token in 50, which is 1 %."""


@dataclass(frozen=True)
class IsoTable:
    """Throughput per GPU [level][curve] at matched interactivity; None where a frontier does not
    reach."""

    levels: tuple[float, ...]
    curves: tuple[Curve, ...]
    cells: tuple[tuple[float | None, ...], ...]

    def gains(self) -> list[tuple[float, Curve, Curve, float]]:
        """(level, first curve that reaches it, last one that does, ratio) for every level that two
        curves reach."""
        found = []
        for level, row in zip(self.levels, self.cells):
            reached = [index for index, cell in enumerate(row) if cell is not None]
            if len(reached) > 1:
                first, last = reached[0], reached[-1]
                found.append((level, self.curves[first], self.curves[last], row[last] / row[first]))
        return found


def iso_table(curves: Sequence[Curve], levels: Sequence[float]) -> IsoTable:
    """Interpolates every curve's Pareto frontier at every level (tokens per second per user)."""
    cells = tuple(tuple(curve.frontier.at(level) for curve in curves) for level in levels)
    return IsoTable(tuple(levels), tuple(curves), cells)


def levels_within(curve: Curve, count: int = 6) -> list[float]:
    """Round levels (1, 2 or 5 times a power of ten, then their multiples) inside a curve's range,
    for other workloads."""
    low, high = float(curve.frontier.intvty[0]), float(curve.frontier.intvty[-1])
    if low == high:
        return [low]
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= raw)
    first = math.ceil(low / step)
    return [round(index * step, 10) for index in range(first, math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Headline:
    """The last curve's peak against the first curve's most interactive point, the way the article
    compares them."""

    first: Curve
    last: Curve
    throughput_gain: float
    interactivity_gain: float
    days: int | None


def headline(curves: Sequence[Curve]) -> Headline | None:
    """None for fewer than two curves."""
    if len(curves) < 2:
        return None
    first, last = curves[0], curves[-1]
    start, end = first.most_interactive, last.peak
    days = (
        (date.fromisoformat(last.date) - date.fromisoformat(first.date)).days
        if _dated(first) and _dated(last)
        else None
    )
    return Headline(
        first, last, end.tput_per_gpu / start.tput_per_gpu, end.intvty / start.intvty, days
    )


def _dated(curve: Curve) -> bool:
    try:
        date.fromisoformat(curve.date)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class CostRow:
    """Dollars per million tokens of one point for one owner: all tokens, those read, those
    written."""

    curve: Curve
    concurrency: int
    tput_per_gpu: float
    intvty: float
    owner: str
    dollars_per_gpu_hour: float
    total: float
    input: float
    output: float


def cost_rows(curves: Sequence[Curve], costs: CostTable) -> list[CostRow]:
    """One row a point and owner; points of hardware that the table does not price are left out."""
    return [
        CostRow(
            curve,
            point.concurrency,
            point.tput_per_gpu,
            point.intvty,
            owner,
            price,
            dollars_per_million(price, point.tput_per_gpu),
            dollars_per_million(price, point.input_tput_per_gpu),
            dollars_per_million(price, point.output_tput_per_gpu),
        )
        for curve in curves
        for point in curve.points
        for owner, price in costs.prices(curve.hardware).items()
    ]


@dataclass(frozen=True)
class Disagreement:
    """A cell of the article that its printed points do not give."""

    date: str
    level: float
    article: float
    ours: float | None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None else self.ours / self.article - 1


def disagreements(published: PublishedTable) -> list[Disagreement]:
    """Cells of the article's table that interpolation through its printed points misses by more
    than AGREEMENT.

    A cell that only one side can reach is one too.
    """
    found = []
    for curve in published.curves:
        for level, article in published.iso_cells[curve.date].items():
            ours = curve.frontier.at(level)
            if article is None and ours is None:
                continue
            if article is None or ours is None or abs(ours / article - 1) > AGREEMENT:
                found.append(
                    Disagreement(
                        curve.date, level, article if article is not None else math.nan, ours
                    )
                )
    return found
