"""The benchmark and the evaluation against a real server: the host's own client, its HTTP
interface, its report of what ran."""

from __future__ import annotations

import json
import os

import pytest

from dsv4_plugin.bench.server import started
from dsv4_plugin.cli import main

QUICK = ("--isl", "32", "--osl", "8", "--prompts-per-user", "3", "--warmups-per-user", "1")


@pytest.fixture(scope="module")
def url(tiny_dir, tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SGLANG_CACHE_DIR": str(place),
        "DSV4_ROUTE": "auto",
    }
    words = [
        "dsv4",
        "serve",
        str(tiny_dir),
        "--cpu",
        "--enable-metrics",
        "--max-total-tokens",
        "16384",
    ]
    with (
        started(words, environment, place / "log", 240) as address,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("SGLANG_CACHE_DIR", str(place))  # where the report of what ran is
        yield address


@pytest.fixture(scope="module")
def swept(url, tmp_path_factory):
    """Results of two points, by concurrency."""
    out = tmp_path_factory.mktemp("results")
    assert main(["bench", url, "--conc", "1,2", *QUICK, "--out", str(out)]) == 0
    return out, {
        result["conc"]: result
        for result in (json.loads(path.read_text()) for path in out.glob("conc-*.json"))
    }


def test_a_point_holds_what_was_asked_and_what_ran(swept, tiny_dir):
    for concurrency, result in swept[1].items():
        figures = result["runs"][0]["figures"]
        assert figures["completed"] == 3 * concurrency and figures["max_concurrency"] == concurrency
        # 0.8 of 32 is 25.6, cut
        assert 3 * concurrency * 25 <= figures["total_input_tokens"] <= 3 * concurrency * 32
        assert 3 * concurrency * 6 <= figures["total_output_tokens"] <= 3 * concurrency * 8
        assert (
            result["warnings"] == []
            and result["num_gpus"] == 1
            and result["hw"] == "cpu"
            and result["precision"] == "fp4"
        )
        # Tokens over time, counted again from the totals: the client's own clock and sums.
        assert result["tput_per_gpu"] == pytest.approx(
            (figures["total_input_tokens"] + figures["total_output_tokens"]) / figures["duration"]
        )
        assert result["active"]["facts"]["model"] == str(tiny_dir)
        assert {row["operator"] for row in result["active"]["rows"]} >= {
            "sparse_mla",
            "moe",
            "compress",
        }
        assert (
            result["framework"] == "sglang+dsv4" and "--enable-metrics" in result["server_command"]
        )
        # the server's, not ours
        assert (
            result["versions"]["sglang"] == "0.5.23"
            and result["environment"]["DSV4_ROUTE"] == "auto"
        )


def test_a_second_call_runs_only_what_is_missing(url, swept, capsys):
    out, before = swept
    # two measurements at once
    assert main(["bench", url, "--conc", "1,2", "--offline", "4", *QUICK, "--out", str(out)]) == 2
    capsys.readouterr()
    assert main(["bench", url, "--conc", "1,2", *QUICK, "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("(measured before)") == 2
    assert json.loads((out / "conc-2.json").read_text()) == before[2]


@pytest.mark.thorough
def test_offline_and_bounded_arrivals_become_curves_of_their_own(url, tmp_path, capsys):
    assert main(["bench", url, "--offline", "4", *QUICK, "--out", str(tmp_path)]) == 0
    # No machine keeps a microsecond; at one request in ten seconds none waits for another, so one
    # trial tells.
    assert (
        main(
            [
                "bench",
                url,
                "--ttft-ms",
                "0.001",
                "--tpot-ms",
                "0.001",
                "--rate",
                "0.1",
                "--prompts",
                "2",
                *QUICK,
                "--out",
                str(tmp_path / "tight"),
            ]
        )
        == 2
    )
    assert "requests hardly overlap" in capsys.readouterr().err
    result = json.loads((tmp_path / "offline-4.json").read_text())
    assert (
        result["scenario"] == "offline" and result["runs"][0]["figures"]["max_concurrency"] is None
    )
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert "offline" in (tmp_path / "report" / "report.md").read_text()


def test_random_weights_answer_nothing(url, tmp_path, request, capsys):
    sums = request.config.rootpath / "tests" / "unit" / "accuracy" / "data" / "sums"
    out = tmp_path / "scores.json"
    assert (
        main(
            [
                "eval",
                url,
                "--gsm8k",
                str(sums),
                "--limit",
                "2",
                "--needle",
                "700",
                "--max-tokens",
                "8",
                "--api",
                "completions",
                "--threshold",
                "0.5",
                "--out",
                str(out),
            ]
        )
        == 1
    )
    gsm8k, needle = json.loads(out.read_text())["scores"]
    assert gsm8k["count"] == 2 and gsm8k["score"] == 0
    assert needle["count"] == 5 and needle["score"] == 0
    said = capsys.readouterr().out
    assert "threshold 0.5: BELOW" in said and said.count("MISSED") == 5
