"""Show which implementation of every operator a server really runs, how often, and why the others
do not.

Without arguments: the server of this user that last wrote its report (see DSV4_REPORT). With --url
the series of a server that was started with --enable-metrics are read, from any machine; they hold
no reasons for what was never a choice.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--url", help="base URL of a server, such as http://127.0.0.1:30000")
    source.add_argument("--file", type=Path, help="report file of a server")
    source.add_argument("--port", type=int, help="port of a server of this user on this machine")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..active import text

    report = from_url(arguments.url) if arguments.url else _from_file(arguments)
    print(json.dumps(asdict(report), indent=1) if arguments.json else text(report))
    return 0


def _from_file(arguments: argparse.Namespace):
    from ..active import ActiveReport, ActiveReportError, default_path, reports_directory

    if arguments.file:
        return ActiveReport.read(arguments.file)
    if arguments.port:
        path = default_path(arguments.port)
        if not path.exists():
            raise ActiveReportError(
                f"there is no {path}; no server of this user on port {arguments.port} has run a"
                " prefill and a decode yet, or DSV4_REPORT names another file: give it with --file"
            )
        return _alive_or_ended(ActiveReport.read(path))
    written = sorted(
        reports_directory().glob("active-*.json"), key=lambda path: path.stat().st_mtime
    )
    if not written:
        raise ActiveReportError(
            f"there is no report in {reports_directory()}; a server writes it after its first"
            " request. Give --file when DSV4_REPORT was set, or --url"
        )
    return _alive_or_ended(ActiveReport.read(written[-1]))


def _alive_or_ended(report):
    """`report`, which says first when the server of this machine that wrote it has ended."""
    pid = report.facts.get("pid")
    if pid is not None and not Path(f"/proc/{pid}").exists():
        ended = f"has ended (there is no process {pid}); this is what it ran until then"
        report.facts = {"server": ended, **report.facts}
    return report


def from_url(url: str):
    import urllib.error
    import urllib.request

    from ..active import ActiveReportError

    address = url.rstrip("/") + "/metrics/"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            body = answer.read().decode("utf-8")
    except urllib.error.HTTPError as error:
        raise ActiveReportError(
            f"{address} answers {error.code}; start the server with --enable-metrics"
        ) from None
    except (urllib.error.URLError, ValueError) as error:
        raise ActiveReportError(
            f"{address} cannot be read: {getattr(error, 'reason', error)}"
        ) from None
    return _parse(body, address)


def _parse(body: str, address: str):
    """The report that a server's series hold."""
    from prometheus_client.parser import text_string_to_metric_families

    from ..active import ActiveReport, ActiveReportError, Row

    rows, calls, fallbacks, compiles = [], {}, {}, 0
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            labels = sample.labels
            if sample.name == "dsv4_path_info":
                rows.append(
                    Row(
                        labels["operator"],
                        labels["phase"],
                        labels["layers"],
                        labels["rows"],
                        "",
                        labels["implementation"],
                        0,
                        {},
                        False,
                    )
                )
            elif sample.name == "dsv4_calls_total":
                calls[
                    labels["operator"], labels["phase"], labels["layers"], labels["implementation"]
                ] = int(sample.value)
            elif sample.name == "dsv4_fallback_total":
                fallbacks.setdefault(labels["operator"], []).append(
                    f"{labels['reason']} ({int(sample.value)} calls)"
                )
            elif sample.name == "dsv4_compile_after_ready_total":
                compiles = int(sample.value)
    if not rows:
        raise ActiveReportError(
            f"{address} has no series of dsv4_plugin; it is a server without the plugin, or it has"
            " not run a prefill and a decode yet"
        )
    facts = {
        "server": address,
        "compiled after ready": compiles,
        **{f"fell back: {operator}": "; ".join(reasons) for operator, reasons in fallbacks.items()},
    }
    for row in rows:  # the calls are counted over all shapes: they go to the first
        row.calls = calls.pop((row.operator, row.phase, row.layer_kind, row.implementation), 0)
    return ActiveReport(facts, rows)
