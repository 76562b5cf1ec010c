"""What ran: one row for each operator, phase, layer kind and shape class, from the calls that were
really made."""

from __future__ import annotations

import json
import os
import tempfile
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ANY = "any"
"""In place of rows and tensor: of many calls whose shapes are no longer told apart."""


class ActiveReportError(ValueError):
    """A file that is no report of what ran."""


def reports_directory() -> Path:
    """Directory of the reports of all servers of this user: beside SGLang's caches."""
    return Path(os.environ.get("SGLANG_CACHE_DIR") or "~/.cache/sglang").expanduser() / "dsv4"


def default_path(port: int) -> Path:
    """Where the server on `port` writes its report when DSV4_REPORT does not say."""
    return reports_directory() / f"active-{port}.json"


@dataclass
class Row:
    """One choice and the calls it served."""

    operator: str
    phase: str
    layer_kind: str
    rows: str
    """Rows of the operator's first tensor, as a range."""
    tensor: str
    """Dtype, trailing shape and device of the first tensor."""
    implementation: str
    calls: int
    rejected: dict[str, str]
    """Reason by implementation."""
    fallback: bool
    """Whether an implementation that this machine offers was rejected: for its arguments, in favour
    of the reference, or because it does not compile."""

    @property
    def place(self) -> tuple[str, ...]:
        return self.operator, self.phase, self.layer_kind, self.rows, self.tensor


@dataclass
class ActiveReport:
    """Facts of one process and its rows."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Model, device, versions, flags that were set, and when."""
    rows: list[Row] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Writes JSON; a reader sees the old file or the new one, never a part."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        # One row a line, each by json's C encoder: the thread that serves waits for no more.
        rows = ",\n".join(json.dumps(vars(row)) for row in self.rows)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f'{{"facts": {json.dumps(self.facts)},\n"rows": [\n{rows}\n]}}\n')
        os.chmod(fresh, 0o644)
        os.replace(fresh, path)

    @classmethod
    def read(cls, path: Path) -> ActiveReport:
        """Reads what `write` wrote. Raises ActiveReportError for anything else, OSError when it
        cannot be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["facts"], [Row(**row) for row in content["rows"]])
        except (KeyError, TypeError, ValueError):
            raise ActiveReportError(
                f"{path} is no report of what ran; a server writes it, see DSV4_REPORT"
            ) from None


@dataclass
class Line:
    """Rows of one operator and phase that took the same implementation for the same reasons."""

    operator: str
    phase: str
    implementation: str
    rejected: dict[str, str]
    calls: int = 0
    layers: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)


def summary(rows: Iterable[Row]) -> list[Line]:
    """The rows with their kinds of layers and shape classes joined, in the order they first ran."""
    lines: dict[tuple, Line] = {}
    for row in rows:
        same = (row.operator, row.phase, row.implementation, tuple(row.rejected.items()))
        line = lines.setdefault(
            same, Line(row.operator, row.phase, row.implementation, row.rejected)
        )
        line.calls += row.calls
        for value, values in ((row.layer_kind, line.layers), (row.rows, line.rows)):
            if value not in values:
                values.append(value)
    return list(lines.values())


def _said(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    return str(fact)


def text(report: ActiveReport) -> str:
    """The report as a table of plain text within 80 columns: under an operator, what was not taken
    and the shape classes where there are several."""
    head = ("operator", "phase", "layers", "implementation", "calls")
    lines = summary(report.rows)
    body = [
        (
            line.operator,
            line.phase,
            " ".join(line.layers),
            line.implementation,
            str(line.calls),
        )
        for line in lines
    ]
    widths = [max(len(row[column]) for row in (head, *body)) for column in range(len(head))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in (head, *body)
    ]
    shown = table[:1]
    for row, line in zip(table[1:], lines):
        shown.append(row)
        shown += _under("rows", " ".join(sorted(line.rows, key=_first)))
        for name, reason in line.rejected.items():
            shown += _under(f"not {name}", reason)
    facts = [_wrapped(f"{name}: {_said(value)}", "  ") for name, value in report.facts.items()]
    return "\n".join([*facts, *shown])


def _under(what: str, said: str) -> list[str]:
    return [_wrapped(f"    {what}: {said}", "      ")]


def _wrapped(line: str, indent: str) -> str:
    return textwrap.fill(
        line, 80, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _first(rows: str) -> int:
    return -1 if rows == ANY else int(rows.partition("-")[0])
