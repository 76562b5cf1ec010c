"""A real server tells what it ran: in its log, its file and on /metrics, with calls that were
really made."""

from __future__ import annotations

import json
import subprocess
import time

import pytest
from live_server import DSV4, serving

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def server(tiny_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("what-ran")
    with serving(
        tiny_dir,
        directory / "log",
        "--enable-metrics",
        DSV4_PROBE="1",
        DSV4_REPORT=str(directory / "ran.json"),
        SGLANG_ENABLE_THINKING="1",
    ) as running:
        running.report = directory / "ran.json"
        running.generate(list(range(5, 45)), new_tokens=3)
        yield running


def settled(server) -> dict:
    """The report once it no longer changes; the server refreshes it some seconds after the last
    step."""
    before, end = None, time.monotonic() + 60
    while time.monotonic() < end:
        if server.report.exists():
            now = json.loads(server.report.read_text())["rows"]
            if now == before:
                return json.loads(server.report.read_text())
            before = now
        time.sleep(7)
    raise AssertionError("the report never settled")


def calls(report, operator, phase):
    return sum(
        row["calls"]
        for row in report["rows"]
        if (row["operator"], row["phase"]) == (operator, phase)
    )


def test_the_calls_of_one_request_are_counted(server, tiny_dir):
    layers = json.loads((tiny_dir / "config.json").read_text())["num_hidden_layers"]
    before = settled(server)
    server.generate(list(range(60, 100)), new_tokens=NEW_TOKENS, logprob_start=-1)
    after = settled(server)
    assert calls(after, "sparse_mla", "prefill") - calls(before, "sparse_mla", "prefill") == layers
    decoded = calls(after, "sparse_mla", "decode") - calls(before, "sparse_mla", "decode")
    # The first token comes from the prefill; the host may have launched one more step when the
    # request ends.
    assert decoded in (layers * (NEW_TOKENS - 1), layers * NEW_TOKENS)
    greedy = [
        calls(after, "sample_greedy", phase) - calls(before, "sample_greedy", phase)
        for phase in ("prefill", "decode")
    ]
    assert greedy == [1, decoded // layers], "every step's tokens come from the operator"
    assert all(row["calls"] > 0 for row in after["rows"]), "what only the probe ran is not reported"
    assert {row["layer_kind"] for row in after["rows"] if row["operator"] == "sparse_mla"} == {
        "window",
        "c4",
        "c128",
    }
    assert all(row["implementation"] == "reference" for row in after["rows"])
    assert after["facts"]["device"] == "cpu" and "DSV4_PROBE=1" in after["facts"]["flags"]


def test_file_and_metrics_agree(server):
    report = settled(server)
    ran = subprocess.run(
        [DSV4, "active", "--json", "--url", server.url], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    series = json.loads(ran.stdout)
    for operator in ("sparse_mla", "moe", "compress"):
        for phase in ("prefill", "decode"):
            assert calls(series, operator, phase) == calls(report, operator, phase) > 0
    assert series["facts"]["compiled after ready"] == 0
    parts = report["facts"]["start-up, seconds"]
    assert list(parts)[0] == "import" and "weights" in parts and len(parts) == 7
    assert all(seconds >= 0 for seconds in parts.values()) and sum(parts.values()) > 1
    shown = subprocess.run(
        [DSV4, "active", "--file", server.report], capture_output=True, text=True, timeout=120
    ).stdout
    assert "sparse_mla" in shown and "triton: there is no GPU" in shown


def test_the_log_says_what_runs_once_and_what_the_probe_found(server):
    log = server.log.read_text()
    assert log.count("dsv4_plugin: what runs, after the first prefill and decode") == 1
    assert (
        log.count(
            "SGLANG_ENABLE_THINKING=1 has no effect: SGLang renamed it; set SGLANG_DEFAULT_THINKING"
        )
        == 1
    )
    assert "probe of" in log and "every operator runs its reference" in log
