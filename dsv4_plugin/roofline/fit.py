"""What holds back each measured point: the limit's terms, stretched until they meet the
measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..config import Geometry
from ..report.curves import Curve, Point
from .hardware import Hardware
from .layout import Layout
from .limit import LimitPoint, Workload, limit_point
from .step import Efficiency

TERMS = ("launches", "data and compute", "prefill")


@dataclass(frozen=True)
class FittedPoint:
    """One measured point: its cycle (seconds a request takes), the fitted one and the limit's, and
    each term's share of the fitted one. `fitted` is False for a point that took no part."""

    point: Point
    measured_cycle: float
    fitted_cycle: float
    limit_cycle: float
    limit_tpot: float
    fitted: bool
    shares: dict[str, float]

    @property
    def fraction(self) -> float:
        """Fraction of the limit at this concurrency and layout that the measurement reaches."""
        return self.limit_cycle / self.measured_cycle


@dataclass(frozen=True)
class Fit:
    """One curve's stretch of the limit. `launch` seconds per dependent kernel, the rest in
    fractions of peak."""

    curve: Curve
    launch: float
    decode_efficiency: float
    prefill_efficiency: float
    points: tuple[FittedPoint, ...]

    @property
    def prefill_resolved(self) -> bool:
        """False when the fit wants prefill faster than its limit: decode hides it, and the figure
        says nothing."""
        return self.prefill_efficiency < 0.999

    @property
    def worst_error(self) -> float:
        """Largest relative error of a fitted cycle, over the points that took part."""
        return max(abs(p.fitted_cycle / p.measured_cycle - 1) for p in self.points if p.fitted)

    def efficiency(self) -> Efficiency:
        """The same as assumptions of `dsv4 roofline --what-if`."""
        return Efficiency(
            bandwidth=self.decode_efficiency,
            compute=self.decode_efficiency,
            link=self.decode_efficiency,
            launch=self.launch,
            prefill=self.prefill_efficiency / self.decode_efficiency,
        )


def geometry_of(curve: Curve, geometry: Geometry) -> Geometry:
    """The geometry that a curve served: an FP8 conversion stores its experts in FP8."""
    return replace(geometry, expert_dtype="fp8") if curve.precision == "fp8" else geometry


def fit_curve(
    curve: Curve, geometry: Geometry, hardware: Hardware, index_dtype: str = "fp8"
) -> Fit:
    """Least squares in relative error over the cycle and the time per output token of the curve's
    Pareto points.

    cycle = concurrency · prefill / e_p + osl · (kernels · launch + work / e_d), and the time per
    token is the same without the request's own prefill, for launch >= 0 and efficiencies in (0, 1].
    A measured cycle is the tokens of a request over the throughput. A point beaten by another of
    its curve is held back by something else (a full cache pool, say): it is compared with the fit
    and takes no part in it. Raises LayoutError for a layout that does not fit the model.
    """
    from scipy.optimize import lsq_linear

    workload = Workload.nominal(curve.isl, curve.osl)
    model = geometry_of(curve, geometry)
    bounds = [
        limit_point(
            model,
            hardware,
            Layout.parse(point.layout),
            point.concurrency,
            workload,
            index_dtype=index_dtype,
        )
        for point in curve.points
    ]
    terms = [_terms(bound) for bound in bounds]
    cycles = [
        point.concurrency * (workload.isl + workload.osl) / (point.tput_per_gpu * curve.gpus)
        for point in curve.points
    ]
    fitted = [curve.frontier.holds(point.intvty, point.tput_per_gpu) for point in curve.points]
    rows = []
    for point, bound, term, cycle, takes_part in zip(curve.points, bounds, terms, cycles, fitted):
        if takes_part:
            own_prefill = np.array([0.0, 0.0, bound.prefill_seconds * bound.prompts_together])
            rows += [term / cycle, (term - own_prefill) / (workload.osl / point.intvty)]
    # In units of 1 us a launch is near 1 like the other unknowns, so the solver's tolerance serves
    # them alike.
    unit = np.array([1e-6, 1.0, 1.0])
    solution = (
        unit
        * lsq_linear(np.array(rows) * unit, np.ones(len(rows)), bounds=([0.0, 1.0, 1.0], np.inf)).x
    )
    points = tuple(
        FittedPoint(
            point,
            cycle,
            float(term @ solution),
            bound.cycle,
            bound.tpot,
            takes_part,
            {name: float(part / (term @ solution)) for name, part in zip(TERMS, term * solution)},
        )
        for point, bound, cycle, term, takes_part in zip(
            curve.points, bounds, cycles, terms, fitted
        )
    )
    return Fit(curve, float(solution[0]), 1 / float(solution[1]), 1 / float(solution[2]), points)


def _terms(bound: LimitPoint) -> NDArray[np.float64]:
    """Seconds of a cycle per second of launch, at full efficiency of decode, and at full efficiency
    of prefill."""
    kernels = sum(component.launches for component in bound.decode.components)
    work = bound.decode.seconds - kernels * bound.decode.hardware.launch
    osl = bound.workload.osl
    return np.array([osl * kernels, osl * work, bound.concurrency * bound.prefill_seconds])
