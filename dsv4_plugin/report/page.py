"""Sections of text and tables as GitHub Markdown and as one HTML page that needs nothing beside
it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Column names and rows."""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs of text, tables and, where `figure` is set, the Pareto figure."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figure: bool = False


def number(value: float) -> str:
    """A throughput to three or four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 1 else f"{value:.3g}"


def markdown(sections: Sequence[Section]) -> str:
    """GitHub Markdown that links pareto.png."""
    lines: list[str] = []
    for index, section in enumerate(sections):
        lines += [f"{'#' if index == 0 else '##'} {section.heading}", ""]
        lines += ["![Pareto curves](pareto.png)", ""] if section.figure else []
        for paragraph in section.paragraphs:
            lines += [paragraph, ""]
        for columns, rows in section.tables:
            lines += (
                _markdown_row(columns),
                _markdown_row(["---"] * len(columns)),
                *map(_markdown_row, rows),
                "",
            )
    return "\n".join(lines)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem; text-align: right; border-bottom: 1px solid #e3e3e3; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #999; }
"""


def page(sections: Sequence[Section], picture: str) -> str:
    """One HTML page with the figure inside it; `picture` is SVG text."""
    escape = html.escape
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(sections[0].heading)}</title><style>{_STYLE}</style></head><body>",
    ]
    for index, section in enumerate(sections):
        level = "h1" if index == 0 else "h2"
        parts.append(f"<{level}>{escape(section.heading)}</{level}>")
        if section.figure:
            parts.append(picture[picture.index("<svg") :])
        parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs]
        for columns, rows in section.tables:
            head = "".join(f"<th>{escape(cell)}</th>" for cell in columns)
            body = "".join(
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            parts.append(
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            )
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"
