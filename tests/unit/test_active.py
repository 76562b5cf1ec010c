"""The report of what ran: the file, its table, and the series a server shows for it."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dsv4_plugin.active import ActiveReport, ActiveReportError, Row, default_path, summary, text
from dsv4_plugin.cli import main

ROWS = [
    Row(
        "moe",
        "decode",
        "c4",
        "1",
        "bfloat16 x256 on gpu",
        "triton",
        12,
        {"flydsl": "package flydsl is not installed"},
        False,
    ),
    Row(
        "moe",
        "decode",
        "c4",
        "16-31",
        "bfloat16 x256 on gpu",
        "triton",
        8,
        {"flydsl": "package flydsl is not installed"},
        False,
    ),
    Row(
        "moe",
        "prefill",
        "c4",
        "2048-4095",
        "bfloat16 x256 on gpu",
        "reference",
        2,
        {"triton": "over 1024 rows"},
        True,
    ),
]


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "deep" / "report.json"
    ActiveReport({"device": "gfx950"}, ROWS).write(path)
    assert ActiveReport.read(path) == ActiveReport({"device": "gfx950"}, ROWS)
    assert os.listdir(path.parent) == ["report.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"facts": {}, "rows": [{"operator": "moe"}]}']
)
def test_another_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ActiveReportError, match=f"{path} is no report"):
        ActiveReport.read(path)


def test_layers_and_shapes_are_joined_only_where_choice_and_reasons_agree():
    other = Row(
        "moe", "decode", "c128", "1", "bfloat16 x256 on gpu", "triton", 4, ROWS[0].rejected, False
    )
    lines = summary([*ROWS, other])
    assert [(line.phase, line.layers, line.rows, line.calls) for line in lines] == [
        ("decode", ["c4", "c128"], ["1", "16-31"], 24),
        ("prefill", ["c4"], ["2048-4095"], 2),
    ]


def test_table_names_implementation_calls_and_reasons(tmp_path, capsys):
    path = tmp_path / "report.json"
    ActiveReport({"device": "gfx950"}, ROWS).write(path)
    assert main(["active", "--file", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed == text(ActiveReport({"device": "gfx950"}, ROWS)) + "\n"
    assert printed.splitlines()[0] == "device: gfx950"
    assert max(map(len, printed.splitlines())) <= 80
    [at] = [at for at, line in enumerate(printed.splitlines()) if " prefill " in line]
    row, rows, reason = printed.splitlines()[at : at + 3]
    assert row.split() == ["moe", "prefill", "c4", "reference", "2"]
    assert rows.strip() == "rows: 2048-4095" and reason.strip() == "not triton: over 1024 rows"
    assert main(["active", "--json", "--file", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["calls"] == 12


def test_the_newest_report_of_this_user_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path))
    assert main(["active"]) == 2 and main(["active", "--port", "30000"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in errors[0] and "active-30000.json" in errors[1]
    for port, moment in ((30001, 200), (30000, 100)):
        ActiveReport({"port": port}, ROWS).write(default_path(port))
        os.utime(default_path(port), (moment, moment))
    main(["active"])
    assert capsys.readouterr().out.startswith("port: 30001")
    main(["active", "--port", "30000"])
    assert capsys.readouterr().out.startswith("port: 30000")


def test_missing_file_and_dead_server_are_one_line(tmp_path, capsys):
    assert main(["active", "--file", str(tmp_path / "none.json")]) == 2
    assert main(["active", "--url", "http://127.0.0.1:9"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "none.json" in lines[0] and "cannot be read" in lines[1]


def test_calls_without_their_shapes_have_a_line():
    past = Row("moe", "decode", "c4", "any", "any", "triton", 3, ROWS[0].rejected, False)
    assert "1 16-31" in text(ActiveReport({}, [*ROWS, past]))
    [line] = summary([ROWS[0], past])
    assert line.calls == 15


_WRITE_SERIES = """
from dsv4_plugin.host.metrics import Series
from tests.unit.test_active import ROWS, Row
series = Series()
series.set(ROWS, 0)
ROWS[0].calls += 5; ROWS[2].calls += 1
series.set(ROWS, 3)
series.set(ROWS, 3)
# The operator chose anew: what was counted lies in rows without shapes, the new ones begin at 0.
past = [Row(*row.place[:3], "any", "any", row.implementation, row.calls, row.rejected, row.fallback)
        for row in ROWS]
ROWS[0].calls = 4
series.set([*past, ROWS[0]], 3)
"""


@pytest.fixture
def metrics_url(tmp_path):
    """A server of the host's /metrics route, over series that another process wrote, as a scheduler
    does."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", _WRITE_SERIES],
        env=environment,
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=300,
    )
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    body = generate_latest(registry)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", body.decode()
    server.shutdown()


def test_series_hold_calls_fallbacks_and_compiles(metrics_url, capsys):
    url, body = metrics_url
    assert 'dsv4_fallback_total{operator="moe",reason="triton: over 1024 rows"} 3.0' in body
    assert "dsv4_compile_after_ready_total 3.0" in body
    assert main(["active", "--url", url, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["facts"]["compiled after ready"] == 3
    assert read["facts"]["fell back: moe"] == "triton: over 1024 rows (3 calls)"
    decode = [row for row in read["rows"] if row["phase"] == "decode"]
    assert {row["rows"] for row in decode} == {"1", "16-31", "any"} and {
        row["implementation"] for row in decode
    } == {"triton"}
    assert sum(row["calls"] for row in decode) == 29
    assert main(["active", "--url", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    [at] = [at for at, line in enumerate(lines) if " decode " in line]
    assert lines[at].split() == ["moe", "decode", "c4", "triton", "29"]
    assert lines[at + 1].strip() == "rows: any 1 16-31"


@pytest.mark.parametrize("alive", [True, False])
def test_a_server_that_has_ended_is_shown_as_ended(alive, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    ActiveReport({"pid": os.getpid() if alive else child.pid}, ROWS).write(default_path(31000))
    for words in ([], ["--port", "31000"]):
        assert main(["active", *words]) == 0
        assert ("has ended" in capsys.readouterr().out) is not alive
