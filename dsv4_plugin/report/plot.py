"""The Pareto figure: throughput per GPU against interactivity, measured curves and the hardware's
limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .curves import Curve, origin, throughput_unit
from .pareto import Frontier
from .service_levels import SERVICE_LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Limit:
    """A best possible curve with the name that the legend gives it."""

    label: str
    frontier: Frontier

    def fraction(self, intvty: float, tput: float) -> float | None:
        """Measured throughput over the best possible at the same interactivity; None where the
        limit does not reach.

        Left of the limit's range its highest throughput counts: being slower for the user cannot
        lower the bound.
        """
        bound = self.frontier.at(max(intvty, float(self.frontier.intvty[0])))
        return None if bound is None else tput / bound


def draw(curves: Sequence[Curve], limit: Limit | None = None) -> Figure:
    """The figure; with a limit, a second panel shows the fraction of it that every point reaches.

    Filled markers lie on a curve's Pareto frontier, hollow ones are beaten by another point of the
    same curve. Numbers are concurrencies, written where there is room.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(10, 8.6 if limit else 6.4), dpi=150, layout="constrained")
    if limit:
        axes, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    else:
        axes, lower = figure.subplots(), None
    colours = _colours(len(curves))
    if limit:
        axes.plot(
            *limit.frontier.curve(),
            color="0.35",
            linestyle="--",
            linewidth=1.4,
            label=limit.label,
            zorder=1,
        )
    for index, (curve, colour) in enumerate(zip(curves, colours)):
        marker = _MARKERS[index % len(_MARKERS)]
        _draw_curve(axes, curve, colour, marker)
        if lower is not None and limit is not None:
            _draw_fractions(lower, curve, limit, colour, marker)
    lowest, highest = (
        pick(p.tput_per_gpu for curve in curves for p in curve.points) for pick in (min, max)
    )
    own = not limit and not any(curve.published for curve in curves)
    if own:
        axes.set_ylim(bottom=0)
    elif limit or highest > 10 * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylabel(f"throughput, input + output ({throughput_unit(curves)})")
    axes.grid(True, which="major", color="0.88", linewidth=0.8)
    axes.grid(True, which="minor", axis="y", color="0.95", linewidth=0.5)
    figure.legend(
        loc="outside upper center",
        ncols=2,
        fontsize=8.5,
        title_fontsize=9.5,
        frameon=False,
        title=(
            f"{_title(curves)}\n{origin(curves)}\n"
            "numbers: concurrency; hollow: beaten by another point of its curve"
        ),
    )
    # The limit goes far beyond any user's interactivity; the axis ends a little after the
    # measurements.
    axes.set_xlim(0, 1.05 * max(point.intvty for curve in curves for point in curve.points))
    _draw_service_levels(axes)
    bottom = lower if lower is not None else axes
    bottom.set_xlabel("interactivity (tokens/s/user)")
    if lower is not None:
        lower.set_ylabel("of the limit at the\nsame interactivity (%)")
        lower.set_ylim(bottom=0)
        lower.grid(True, color="0.9", linewidth=0.7)
    _label_concurrency(figure, axes, curves, colours)
    return figure


def _draw_service_levels(axes: Axes) -> None:
    """A line at the interactivity that each service level asks for, where the axis reaches it."""
    for name, level in SERVICE_LEVELS.items():
        if level.intvty < axes.get_xlim()[1]:
            axes.axvline(level.intvty, color="0.6", linestyle=":", linewidth=1.0, zorder=0)
            axes.annotate(
                f"{name}: TPOT {level.tpot_ms:g} ms",
                (level.intvty, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                rotation=90,
                fontsize=7,
                color="0.45",
            )


def _colours(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    # Viridis reads in order of date for every kind of colour vision; its bright end is too faint on
    # white.
    return [
        tuple(colormaps["viridis"](position)) for position in np.linspace(0.0, 0.8, count)[::-1]
    ]


def _draw_curve(axes: Axes, curve: Curve, colour: tuple[float, ...], marker: str) -> None:
    x, y = curve.frontier.curve()
    style = "-" if curve.published else (0, (5, 1))
    kind = "" if curve.published else " (own measurement)"
    axes.plot(x, y, color=colour, linewidth=1.8, linestyle=style, zorder=2)
    best = [p for p in curve.points if curve.frontier.holds(p.intvty, p.tput_per_gpu)]
    beaten = [p for p in curve.points if p not in best]
    axes.plot(
        [p.intvty for p in best],
        [p.tput_per_gpu for p in best],
        marker,
        color=colour,
        markersize=6,
        zorder=3,
        label=curve.label + kind,
    )
    axes.plot(
        [p.intvty for p in beaten],
        [p.tput_per_gpu for p in beaten],
        marker,
        markeredgecolor=colour,
        markerfacecolor="white",
        markersize=6,
        zorder=3,
    )


def _draw_fractions(
    axes: Axes, curve: Curve, limit: Limit, colour: tuple[float, ...], marker: str
) -> None:
    reached = [(p.intvty, limit.fraction(p.intvty, p.tput_per_gpu)) for p in curve.points]
    known = [(x, 100 * fraction) for x, fraction in sorted(reached) if fraction is not None]
    axes.plot(
        [x for x, _ in known],
        [y for _, y in known],
        marker=marker,
        color=colour,
        linewidth=1,
        markersize=4.5,
    )


def _label_concurrency(
    figure: Figure, axes: Axes, curves: Sequence[Curve], colours: Sequence[tuple[float, ...]]
) -> None:
    """Writes concurrencies beside points, latest curve first; one that would touch another text, a
    point or a line is left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    taken: list[Bbox] = []
    to_pixels = axes.transData.transform
    obstacles = np.array(
        [to_pixels((p.intvty, p.tput_per_gpu)) for curve in curves for p in curve.points]
    )
    lines = np.concatenate([to_pixels(np.column_stack(curve.frontier.curve())) for curve in curves])
    frame = axes.get_window_extent()
    for curve, colour in list(zip(curves, colours))[::-1]:
        for point in curve.points:
            for offset, side in (
                ((6, 5), "left"),
                ((-6, 5), "right"),
                ((6, -12), "left"),
                ((-6, -12), "right"),
            ):
                text = axes.annotate(
                    str(point.concurrency),
                    (point.intvty, point.tput_per_gpu),
                    offset,
                    ha=side,
                    textcoords="offset points",
                    fontsize=7.5,
                    color=colour,
                    zorder=4,
                )
                box = text.get_window_extent().padded(1)
                inside = (
                    frame.x0 < box.x0
                    and box.x1 < frame.x1
                    and frame.y0 < box.y0
                    and box.y1 < frame.y1
                )
                if (
                    inside
                    and not any(box.overlaps(other) for other in taken)
                    and not _covers(box, obstacles, 6)
                    and not _covers(box, lines, 1)
                ):
                    taken.append(box)
                    break
                text.remove()


def _covers(box: Bbox, pixels: NDArray[np.float64], margin: float) -> bool:
    x, y = pixels[:, 0], pixels[:, 1]
    return bool(
        np.any(
            (x > box.x0 - margin)
            & (x < box.x1 + margin)
            & (y > box.y0 - margin)
            & (y < box.y1 + margin)
        )
    )


def _title(curves: Sequence[Curve]) -> str:
    def of(attribute: str) -> str:
        return " / ".join(dict.fromkeys(str(getattr(curve, attribute)) for curve in curves))

    models = " / ".join(
        dict.fromkeys(curve.model.rstrip("/").split("/")[-1] for curve in curves if curve.model)
    )
    return (
        f"{models} on {of('gpus')} × {of('hardware')}, {curves[0].isl} tokens in /"
        f" {curves[0].osl} out"
    )
