"""Sections of text and tables as GitHub Markdown and as one HTML page that needs nothing beside
it."""

from __future__ import annotations

import re
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
        lines += [f"{'#' if index == 0 else '##'} {_escaped(section.heading)}", ""]
        lines += [_FIGURE, ""] if section.figure else []
        for paragraph in section.paragraphs:
            lines += [_escaped(paragraph), ""]
        for columns, rows in section.tables:
            cells = [[_escaped(cell) for cell in row] for row in (columns, *rows)]
            ruler = [":--", *["--:"] * (len(columns) - 1)]
            lines += [*(f"| {' | '.join(row)} |" for row in (cells[0], ruler, *cells[1:])), ""]
    return "\n".join(lines)


_FIGURE = "![Pareto curves](pareto.png)"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222;
       max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg { width: 100%; height: auto; }
table { display: block; overflow-x: auto; border-collapse: collapse;
        font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #999; }
"""


def page(sections: Sequence[Section], picture: str) -> str:
    """The same as one HTML page with the figure inside it; `picture` is SVG text."""
    from markdown_it import MarkdownIt

    title, figure = (
        MarkdownIt().renderInline(text) for text in (_escaped(sections[0].heading), _FIGURE)
    )
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n"
        f"{body.replace(figure, picture[picture.index('<svg') :])}</body></html>\n"
    )


def _escaped(text: str) -> str:
    """`text` without a meaning in Markdown; underscores within words have none."""
    return re.sub(r"([\\`*\[<|])", r"\\\1", text)
