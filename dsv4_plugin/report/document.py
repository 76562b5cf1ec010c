"""The report as files: CSV tables, Markdown and one HTML page that needs nothing beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .comparison import (
    AGREEMENT,
    CostRow,
    Disagreement,
    Headline,
    IsoTable,
    cost_rows,
    disagreements,
    headline,
    iso_table,
    levels_within,
)
from .cost import CostTable, dollars_per_million
from .curves import Curve, PublishedTable, load_other_stacks, origin, throughput_unit
from .page import Section, markdown, number, page
from .plot import Limit, draw
from .service_levels import SERVICE_LEVELS, SOURCE


@dataclass(frozen=True)
class Report:
    """Everything a report shows; `limit` is the hardware's, drawn above the curves, and `further`
    are sections of others."""

    curves: tuple[Curve, ...]
    published: PublishedTable | None
    costs: CostTable
    iso: IsoTable
    limit: Limit | None = None
    further: tuple[Section, ...] = ()

    @classmethod
    def of(
        cls,
        curves: Sequence[Curve],
        published: PublishedTable | None,
        costs: CostTable,
        levels: Sequence[float] = (),
        limit: Limit | None = None,
        further: Sequence[Section] = (),
    ) -> Report:
        """Builds the tables. Without levels: the article's, and round ones for curves that none of
        those reaches."""
        chosen = set(levels or (published.iso_levels if published else ()))
        if not levels:
            for curve in curves:
                if not curve.published and not any(
                    curve.frontier.at(level) is not None for level in chosen
                ):
                    chosen.update(levels_within(curve))
        return cls(
            tuple(curves),
            published,
            costs,
            iso_table(curves, sorted(chosen)),
            limit,
            tuple(further),
        )

    def write(self, directory: Path) -> list[Path]:
        """Writes pareto.png, pareto.svg, iso_interactivity.csv, cost.csv, report.md and
        report.html; returns their paths."""
        figure = draw(self.curves, self.limit)
        picture = io.StringIO()
        figure.savefig(picture, format="svg")
        sections = self.sections()
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(directory / "pareto.png")
        texts = {
            "pareto.svg": picture.getvalue(),
            "iso_interactivity.csv": _csv(
                ["tok_s_user", *(curve.column for curve in self.curves)],
                [
                    [f"{level:g}", *("" if cell is None else f"{cell:.1f}" for cell in row)]
                    for level, row in zip(self.iso.levels, self.iso.cells)
                ],
            ),
            "cost.csv": _cost_csv(cost_rows(self.curves, self.costs)),
            "report.md": markdown(sections),
            "report.html": page(sections, picture.getvalue()),
        }
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        return [directory / "pareto.png", *(directory / name for name in texts)]

    def sections(self) -> list[Section]:
        sections = [self._summary(), self._iso(), self._gains(), self._goodput()]
        sections += [self._cost(), *self.further]
        if self.published:
            sections.append(_agreement(self.published, disagreements(self.published)))
            sections.append(_other_stacks())
        sections.append(self._points())
        return [
            section
            for section in sections
            if section.paragraphs or section.tables or section.figure
        ]

    @property
    def _unit(self) -> str:
        return throughput_unit(self.curves)

    def _summary(self) -> Section:
        first = self.curves[0]
        lines = [
            origin(self.curves),
            f"Workload {first.isl} tokens in, {first.osl} out. Throughput counts input and output"
            f" tokens, in {self._unit}; interactivity is the median over requests of output tokens"
            " per second after the first.",
        ]
        compared = headline(
            [curve for curve in self.curves if curve.published] if self.published else self.curves
        )
        if compared:
            lines.append(_headline_text(compared, self.published))
        peaks = [
            [
                curve.label,
                number(curve.peak.tput_per_gpu),
                str(curve.peak.concurrency),
                f"{curve.peak.intvty:.2f}",
                curve.peak.layout,
            ]
            for curve in self.curves
        ]
        columns = ("curve", f"peak {self._unit}", "at concurrency", "tokens/s/user", "layout")
        return Section(
            "Throughput against interactivity", tuple(lines), ((columns, peaks),), figure=True
        )

    def _iso(self) -> Section:
        rows = [
            [f"{level:g}", *("–" if cell is None else number(cell) for cell in row)]
            for level, row in zip(self.iso.levels, self.iso.cells)
        ]
        if not rows:
            return Section("Matched interactivity")
        text = (
            f"{self._unit} at matched interactivity, interpolated along each curve's"
            " Pareto frontier by a monotone cubic (Steffen 1990). – is outside the measured range:"
            " unreachable, never extrapolated."
        )
        return Section(
            "Matched interactivity",
            (text,),
            ((("tokens/s/user", *(c.column for c in self.curves)), rows),),
        )

    def _gains(self) -> Section:
        article = self.published.iso_gains if self.published else {}
        rows = [
            [
                f"{level:g}",
                first.column,
                last.column,
                f"{gain:.2f}x",
                (
                    f"{article[level]}x"
                    if level in article and last.published and first.published
                    else ""
                ),
            ]
            for level, first, last, gain in self.iso.gains()
        ]
        if not rows:
            return Section("Gains")
        return Section(
            "Gains",
            ("From the first curve that reaches an interactivity to the last one that does.",),
            ((("tokens/s/user", "from", "to", "gain", "article"), rows),),
        )

    def _cost(self) -> Section:
        rows = []
        for curve in self.curves:
            for owner, price in self.costs.prices(curve.hardware).items():
                peak = curve.peak
                rows.append(
                    [
                        curve.column,
                        owner,
                        f"{price:.2f}",
                        number(peak.tput_per_gpu),
                        *(
                            f"{dollars_per_million(price, tput):.3f}"
                            for tput in (
                                peak.tput_per_gpu,
                                peak.input_tput_per_gpu,
                                peak.output_tput_per_gpu,
                            )
                        ),
                    ]
                )
        unpriced = sorted({c.hardware for c in self.curves if not self.costs.prices(c.hardware)})
        lines = [
            "US dollars per million tokens at each curve's peak: $/GPU/h · 10⁶ / (3600 ·"
            f" {self._unit}). cost.csv has every point. Prices: {self.costs.source}. Published"
            " curves print the total only; input and output split it as the workload does."
        ]
        if unpriced:
            lines.append(f"No price for {', '.join(unpriced)} in the cost table.")
        if self.published and self.published.quoted:
            lines.append(_quoted_text(self.published))
        columns = (
            "curve",
            "owner",
            "$/GPU/h",
            self._unit,
            "$/M total",
            "$/M input",
            "$/M output",
        )
        return Section("Cost", tuple(lines), ((columns, rows),) if rows else ())

    def _goodput(self) -> Section:
        """Empty where no curve comes from a benchmark that judged its requests."""
        rows = [
            [
                curve.column,
                str(point.concurrency),
                *(f"{point.goodput[name]:.2f}" for name in SERVICE_LEVELS),
            ]
            for curve in self.curves
            for point in curve.points
            if point.goodput.keys() >= SERVICE_LEVELS.keys()
        ]
        if not rows:
            return Section("Goodput")
        text = (
            "Requests per second that kept a service level, each judged by its own time to the"
            f" first token and mean time per further one ({SOURCE}). Bounds: "
            + "; ".join(
                f"{name} {level.ttft_ms / 1000:g} s and {level.tpot_ms:g} ms"
                for name, level in SERVICE_LEVELS.items()
            )
            + "."
        )
        return Section("Goodput", (text,), ((("curve", "concurrency", *SERVICE_LEVELS), rows),))

    def _points(self) -> Section:
        noted = any(point.note for curve in self.curves for point in curve.points)
        rows = [
            [
                curve.column,
                point.layout,
                str(point.concurrency),
                number(point.tput_per_gpu),
                f"{point.intvty:.2f}",
                "" if point.tpot_ms is None else f"{point.tpot_ms:.2f}",
                *([point.note] if noted else []),
            ]
            for curve in self.curves
            for point in curve.points
        ]
        sources = dict.fromkeys(
            point.source for curve in self.curves for point in curve.points if point.source
        )
        columns = (
            "curve",
            "layout",
            "concurrency",
            self._unit,
            "tokens/s/user",
            "TPOT ms",
            *(["note"] if noted else []),
        )
        return Section(
            "Points", tuple(f"Source: {source}" for source in sources), ((columns, rows),)
        )


def _headline_text(compared: Headline, published: PublishedTable | None) -> str:
    start, end = compared.first.most_interactive, compared.last.peak
    text = (
        f"{compared.first.column} to {compared.last.column}: {number(end.tput_per_gpu)} against"
        f" {number(start.tput_per_gpu)} tokens/s/GPU = {compared.throughput_gain:.1f}x,"
        f" tokens/s/user {compared.interactivity_gain:.2f}x"
    )
    text += f", in {compared.days} days." if compared.days is not None else "."
    if published:
        printed = published.headline
        text += (
            f" The article prints {printed['throughput_gain']}x and"
            f" {printed['interactivity_gain']}x in {printed['days']} days; the printed throughputs"
            " are rounded to 0.1, which leaves 0.3 in that ratio."
        )
    return text


def _quoted_text(published: PublishedTable) -> str:
    quoted = published.quoted
    price, tput = quoted["dollars_per_gpu_hour"], quoted["tput_per_gpu"]
    return (
        f"Quoted later for {quoted['hardware']}: ${quoted['dollars_per_million']}/M at"
        f" {tput:,} tokens/s/GPU; the {price:.2f} $/GPU/h of that day give"
        f" ${dollars_per_million(price, tput):.3f}/M."
    )


def _agreement(published: PublishedTable, found: Sequence[Disagreement]) -> Section:
    rows = [
        [
            each.date,
            f"{each.level:g}",
            f"{each.article:g}",
            "–" if each.ours is None else number(each.ours),
            "" if each.difference is None else f"{100 * each.difference:+.1f} %",
        ]
        for each in found
    ]
    cells = sum(cell is not None for row in published.iso_cells.values() for cell in row.values())
    text = (
        f"{cells - len(found)} of the article's {cells} cells follow from its printed points within"
        f" {AGREEMENT:.0%}. {published.unprinted}"
    )
    return Section(
        "Cells where the article used points it did not print",
        (text,),
        ((("date", "tokens/s/user", "article", "from printed points", "difference"), rows),),
    )


def _other_stacks() -> Section:
    rows = [
        [
            entry["hardware"],
            entry["framework"],
            entry["model"],
            str(entry["date"]),
            entry["layout"],
            entry.get("speculative", ""),
            ", ".join(
                f"{p['concurrency'] or '?'}→{p['tput_per_gpu']:,}"
                + (f" @{p['intvty']:g}" if p["intvty"] else "")
                for p in entry["points"]
            ),
            entry["source"],
        ]
        for entry in load_other_stacks()
    ]
    text = (
        "Other published figures, concurrency→tokens/s/GPU (@tokens/s/user where printed;"
        " ? where the concurrency is not). Client settings, speculative decoding and layout differ,"
        " so they are not comparable one to one and are not drawn."
    )
    return Section(
        "Other stacks",
        (text,),
        ((("GPU", "stack", "model", "date", "layout", "speculative", "points", "source"), rows),),
    )


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def _cost_csv(rows: Iterable[CostRow]) -> str:
    columns = (
        "curve",
        "hardware",
        "concurrency",
        "tok_s_gpu",
        "tok_s_user",
        "owner",
        "dollars_per_gpu_hour",
        "dollars_per_million_total",
        "dollars_per_million_input",
        "dollars_per_million_output",
    )
    return _csv(
        columns,
        (
            [
                row.curve.column,
                row.curve.hardware,
                row.concurrency,
                f"{row.tput_per_gpu:g}",
                f"{row.intvty:g}",
                row.owner,
                f"{row.dollars_per_gpu_hour:g}",
                f"{row.total:.4f}",
                f"{row.input:.4f}",
                f"{row.output:.4f}",
            ]
            for row in rows
        ),
    )
