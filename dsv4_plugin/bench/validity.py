"""What a server really ran while it was measured, and what of it spoils a measurement."""

from __future__ import annotations

import os
import time
import urllib.parse
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import flags
from ..active import ActiveReport, ActiveReportError, default_path

SETTLE_SECONDS = 8.0
"""The server refreshes its report within 5 s of a step; the rest is for a busy machine."""
_FELL = "fell back: "


class ActiveReportReader:
    """Reads the report of the server at `url`: from its file on this machine, otherwise through
    `read_series(url)`.

    `read_series` returns the report that the server's Prometheus series hold, or raises
    ActiveReportError.
    """

    def __init__(self, url: str, read_series: Callable[[str], ActiveReport]):
        self.url = url
        self._read_series = read_series
        address = urllib.parse.urlsplit(url)
        self._port = address.port or 80
        self._local = address.hostname in ("127.0.0.1", "localhost", "::1", "0.0.0.0")

    def read(self) -> ActiveReport | None:
        """The report of this moment; None when the server has none."""
        return self._file() or self._series()

    def settled(self, since: float) -> ActiveReport | None:
        """The report, once it covers all steps before `since` (seconds since the epoch).

        It says the whole second of its writing; one of the very second may miss the last steps,
        whose own follows in time.
        """
        report = self.read()
        while (
            report is not None
            and _written(report) <= since
            and time.time() < since + SETTLE_SECONDS
        ):
            time.sleep(0.5)
            report = self.read()
        return report

    def _file(self) -> ActiveReport | None:
        if not self._local:
            return None
        try:
            report = ActiveReport.read(Path(flags.read("DSV4_REPORT") or default_path(self._port)))
        except (OSError, ActiveReportError):
            return None
        # A file of an earlier server on this port says nothing of this one.
        return (
            report
            if report.facts.get("port") == self._port
            and os.path.exists(f"/proc/{report.facts.get('pid')}")
            else None
        )

    def _series(self) -> ActiveReport | None:
        try:
            return self._read_series(self.url)
        except ActiveReportError:
            return None


def _written(report: ActiveReport) -> float:
    try:
        return datetime.strptime(str(report.facts.get("written")), "%Y-%m-%d %H:%M:%S").timestamp()
    except ValueError:
        return float("-inf")


def warnings(
    before: ActiveReport | None,
    after: ActiveReport | None,
    figures: Mapping[str, Any],
    asked_output_tokens: int,
) -> list[str]:
    """What happened during a run that makes its figures something other than the speed of the
    configuration."""
    found = []
    if after is None:
        found.append(
            "what ran is not known: the server has no report of dsv4_plugin that this machine can"
            " read, so kernels compiled and fall-backs cannot be told"
        )
    else:
        if compiled(before, after):
            found.append(
                f"{compiled(before, after)} kernels were compiled during the run, and requests"
                " waited for them"
            )
        earlier = _fallbacks(before) if before else {}
        for place, calls in _fallbacks(after).items():
            if calls != earlier.get(place):
                found.append(
                    f"{place} fell back to its reference during the run; `dsv4 active` gives the"
                    " reason"
                )
    cached = (figures.get("cache_report") or {}).get("total_cached_tokens", 0)
    if cached:
        found.append(
            f"{cached} of {figures['total_input_tokens']} input tokens came from the prefix cache;"
            " serve with --disable-radix-cache to measure prefill"
        )
    written = figures["total_output_tokens"]
    if written < 0.99 * asked_output_tokens:
        found.append(
            f"{written} of {asked_output_tokens} output tokens were written: the server does not"
            " honour ignore_eos"
        )
    return found


def compiled(before: ActiveReport | None, after: ActiveReport | None) -> int:
    """Kernels compiled while serving, between two reports."""
    counts = [
        int(report.facts.get("compiled after ready") or 0) if report else 0
        for report in (before, after)
    ]
    return max(counts[1] - counts[0], 0)


def _fallbacks(report: ActiveReport) -> dict[str, Any]:
    """Something that grows with the calls that fell back, by the operator's name and phase."""
    counts: dict[str, Any] = {}
    for row in report.rows:
        if row.fallback:
            place = f"{row.operator} in {row.phase}"
            counts[place] = counts.get(place, 0) + row.calls
    counts.update(
        {
            name.removeprefix(_FELL): said
            for name, said in report.facts.items()
            if name.startswith(_FELL)
        }
    )
    return counts
