"""The Pareto frontier of a curve and its value between measured points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Frontier:
    """Points of which none is beaten in both interactivity and throughput, by rising interactivity.

    `intvty` [n] tokens per second per user, strictly rising; `tput` [n] tokens per second per GPU,
    strictly falling.
    """

    intvty: NDArray[np.float64]
    tput: NDArray[np.float64]

    @classmethod
    def of(cls, intvty: Sequence[float], tput: Sequence[float]) -> Frontier:
        """Frontier of points given in any order. Raises ValueError when there is none."""
        if not len(intvty):
            raise ValueError("a Pareto frontier needs at least one point")
        kept: list[tuple[float, float]] = []
        for x, y in sorted(zip(intvty, tput), key=lambda point: (-point[0], -point[1])):
            if not kept or y > kept[-1][1]:
                kept.append((float(x), float(y)))
        x, y = np.array(kept[::-1]).T
        return cls(x, y)

    def at(self, intvty: float) -> float | None:
        """Throughput per GPU at an interactivity, None where the frontier does not reach: nothing
        is extrapolated."""
        if not self.intvty[0] <= intvty <= self.intvty[-1]:
            return None
        if len(self.intvty) == 1:
            return float(self.tput[0])
        return float(monotone_cubic(self.intvty, self.tput, np.array([intvty]))[0])

    def holds(self, intvty: float, tput: float) -> bool:
        """Whether a measured point is one of the frontier's."""
        return bool(np.any((self.intvty == intvty) & (self.tput == tput)))

    def curve(self, samples: int = 200) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The interpolated frontier as (intvty, tput) for drawing."""
        if len(self.intvty) == 1:
            return self.intvty, self.tput
        x = np.linspace(self.intvty[0], self.intvty[-1], samples)
        return x, monotone_cubic(self.intvty, self.tput, x)


def monotone_cubic(
    x: NDArray[np.float64], y: NDArray[np.float64], at: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cubic Hermite interpolation through (x, y) that never overshoots a knot, after M. Steffen
    (1990).

    `x` [n >= 2] strictly rising, `y` [n], `at` [m] within x; returns [m]. Inside, the slope at a
    knot is that of the parabola through it and its neighbours, limited to twice the smaller secant;
    an end knot takes the slope that lets the curve's second derivative vanish there, (3 secant -
    neighbour's slope) / 2. SciPy has no such interpolator: its monotone PCHIP weighs the secants
    harmonically and differs by several per cent on these curves.
    """
    from scipy.interpolate import CubicHermiteSpline

    width = np.diff(x)
    secant = np.diff(y) / width
    slope = np.empty_like(y, dtype=float)
    left, right = secant[:-1], secant[1:]
    parabola = (left * width[1:] + right * width[:-1]) / (width[:-1] + width[1:])
    smallest = np.minimum(np.minimum(abs(left), abs(right)), abs(parabola) / 2)
    slope[1:-1] = (np.sign(left) + np.sign(right)) * smallest
    if len(x) == 2:
        slope[:] = secant[0]
    else:
        slope[0] = (3 * secant[0] - slope[1]) / 2
        slope[-1] = (3 * secant[-1] - slope[-2]) / 2
    return CubicHermiteSpline(x, y, slope)(at)
