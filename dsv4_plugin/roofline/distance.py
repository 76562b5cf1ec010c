"""How far measured curves are from the hardware's limit: the curve to draw and the tables to
print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.released import load_geometry
from ..report.curves import Curve
from ..report.page import Section
from ..report.plot import Limit
from .fit import Fit, fit_curve
from .hardware import Hardware
from .layout import Layout, LayoutError
from .limit import Workload, limit_frontier, limit_points
from .step import Efficiency


@dataclass(frozen=True)
class Distance:
    """A limit and each curve's fit to it. `fits` lacks curves whose layout or model the roofline
    does not describe."""

    limit: Limit
    fits: tuple[Fit, ...]
    hardware: Hardware
    layouts: tuple[Layout, ...]

    def section(self) -> Section:
        """Tables for the report: the fraction of the limit that each point reaches, and what holds
        it back."""
        points = []
        for fit in self.fits:
            for each in fit.points:
                same = self.limit.fraction(each.point.intvty, each.point.tput_per_gpu)
                points.append(
                    [
                        fit.curve.column,
                        each.point.layout,
                        str(each.point.concurrency),
                        f"{1000 / each.point.intvty:.1f}",
                        f"{1000 * each.limit_tpot:.1f}",
                        f"{100 * each.fraction:.1f} %",
                        "–" if same is None else f"{100 * same:.1f} %",
                        *(f"{100 * share:.0f} %" for share in each.shares.values()),
                        f"{100 * (each.fitted_cycle / each.measured_cycle - 1):+.0f} %"
                        + ("" if each.fitted else " (left out)"),
                    ]
                )
        columns = (
            "curve",
            "layout",
            "concurrency",
            "ms/token/user",
            "limit ms",
            "of limit, same load",
            "of limit, same interactivity",
            "launches",
            "data and compute",
            "prefill",
            "fit error",
        )
        fitted = [
            [
                fit.curve.column,
                f"{1e6 * fit.launch:.1f}",
                f"{100 * fit.decode_efficiency:.1f} %",
                f"{100 * fit.prefill_efficiency:.1f} %" if fit.prefill_resolved else "not resolved",
                f"{100 * fit.worst_error:.0f} %",
            ]
            for fit in self.fits
        ]
        return Section(
            f"Distance to the limit of {self.hardware.name}",
            (
                (
                    f"The {self.limit.label}, follows from the model's sizes and the GPU's peak"
                    f" figures, with {1e6 * self.hardware.launch:g} µs assumed for each dependent"
                    " kernel; it is a bound, nobody has measured it."
                ),
                (
                    "The fit stretches three terms of the limit until they meet a curve's"
                    " measurements: the time of one dependent kernel (more kernels than the least"
                    " possible show up here too), the fraction of peak that decode's data movement"
                    " and matrix work reach, and the fraction of its limit that prefill reaches."
                    " Shares say where the fitted time of each point goes."
                ),
            ),
            (
                (
                    (
                        "curve",
                        "µs per kernel",
                        "decode efficiency",
                        "prefill efficiency",
                        "worst error",
                    ),
                    fitted,
                ),
                (columns, points),
            ),
        )


def distance(curves: Sequence[Curve], model: str | None = None, gpu: str | None = None) -> Distance:
    """The limit of the curves' GPU and model, over every layout that they use.

    Raises HardwareError, ConfigError or LayoutError when GPU, model or layout cannot be told from
    the results and are not given.
    """
    hardware = Hardware.named(gpu or _one({curve.hardware for curve in curves}, "GPU", "--gpu"))
    geometry = load_geometry(model or _one({_model(curve) for curve in curves}, "model", "--model"))
    gpus = {curve.gpus for curve in curves}
    named = sorted({point.layout for curve in curves for point in curve.points})
    layouts = tuple(Layout.parse(name) for name in named)
    if not layouts:
        layouts = tuple(Layout(count) for count in sorted(gpus))
    workload = Workload.nominal(curves[0].isl, curves[0].osl)
    frontier = limit_frontier(
        limit_points(geometry, hardware, layouts, workload, efficiency=Efficiency())
    )
    label = f"limit of {hardware.name} as {' and '.join(layout.name for layout in layouts)}"
    return Distance(
        Limit(label, frontier),
        tuple(fit_curve(curve, geometry, hardware) for curve in curves),
        hardware,
        layouts,
    )


def _one(names: set[str], what: str, option: str) -> str:
    if len(names) != 1 or not all(names):
        found = ", ".join(sorted(name or "unknown" for name in names))
        raise LayoutError(f"a limit is of one {what}, the results name {found}; give {option}")
    return names.pop()


def _model(curve: Curve) -> str:
    """ "pro", "flash", or the path that the result names."""
    name = curve.model.rstrip("/").split("/")[-1].lower()
    for released in ("pro", "flash"):
        if f"v4-{released}" in name:
            return released
    return curve.model
