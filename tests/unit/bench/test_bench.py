"""The parts of a benchmark that need no server: shapes of results, resume, spread, the search for a
rate, ablation, warnings."""

import json
import math
import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_plugin import flags
from dsv4_plugin.active import ActiveReport, Row
from dsv4_plugin.bench import ablation, environment
from dsv4_plugin.bench import sweep as sweeping
from dsv4_plugin.bench.client import BenchError, Load, Workload, client_command
from dsv4_plugin.bench.progress import line
from dsv4_plugin.bench.result import inferencex, middle, spread
from dsv4_plugin.bench.server import Server, started
from dsv4_plugin.bench.slo import SLO, largest_rate, search
from dsv4_plugin.bench.store import Store, begun
from dsv4_plugin.bench.sweep import Bench, Progress, sweep
from dsv4_plugin.bench.validity import warnings
from dsv4_plugin.cli import main
from dsv4_plugin.report.curves import load_results

WORKLOAD = Workload(isl=64, osl=16)


def figures(tput=900.0, tpot=20.0, **more):
    """What the client writes of a run: 8 of 9 tokens are read, as at 8k/1k; times in ms."""
    times = {
        f"{kind}_{metric}_ms": value * factor
        for metric, value in (
            ("ttft", 100.0),
            ("tpot", tpot),
            ("itl", tpot),
            ("e2e_latency", 500.0),
        )
        for kind, factor in (
            ("mean", 1.1),
            ("median", 1.0),
            ("std", 0.1),
            ("p90", 1.5),
            ("p95", 1.7),
            ("p99", 2.0),
        )
    }
    return {
        "total_throughput": tput,
        "output_throughput": tput / 9,
        "concurrency": 3.4,
        "total_input_tokens": 800,
        "total_output_tokens": 100,
        "cache_report": {"total_cached_tokens": 0},
        **times,
        **more,
    }


class FakeWatch:
    """No server runs in these tests."""

    def read(self):
        return None


class Machine(Bench):
    """A bench whose runs come from a function of the load; everything after the client is the real
    code."""

    def __init__(self, measure, tp=1):
        super().__init__(
            Server("http://x", "m", "m", "m", {"tp_size": tp}),
            WORKLOAD,
            FakeWatch(),
            {"hw": "mi355x", "date": "2026-09-01"},
        )
        self.measure, self.made = measure, []

    def run(self, load):
        self.made.append(load.name)
        return {
            "figures": self.measure(load),
            "command": ["client"],
            "warnings": [],
            "asked_output_tokens": 100,
            "compiled": 0,
        }

    @contextmanager
    def open(self):
        yield self


class TestResult:
    def test_inferencex_definitions(self):
        """optimizations of InferenceX's process_result: tokens over GPUs, ms to s, intvty the
        reciprocal of the same TPOT figure."""
        made = inferencex(figures(tput=18048.8, tpot=106.75), gpus=8)
        assert made["tput_per_gpu"] == pytest.approx(2256.1) and made[
            "output_tput_per_gpu"
        ] == pytest.approx(2256.1 / 9)
        assert made["input_tput_per_gpu"] == pytest.approx(2256.1 * 8 / 9)
        # the article prints 9.37 beside 106.75 ms
        assert made["median_intvty"] == pytest.approx(9.37, abs=0.005)
        assert (
            made["p99_intvty"] == pytest.approx(1000 / (2 * 106.75)) and made["median_ttft"] == 0.1
        )
        for metric in ("ttft", "tpot", "intvty", "itl", "e2el"):
            assert {
                f"{kind}_{metric}" for kind in ("mean", "median", "std", "p90", "p95", "p99")
            } <= made.keys()

    def test_spread_is_the_larger_of_throughput_and_tpot(self):
        assert spread([figures()]) is None
        assert spread([figures(100), figures(103), figures(102)]) == pytest.approx(3 / 102)
        assert spread(
            [figures(100, tpot=20), figures(100, tpot=22), figures(100, tpot=20)]
        ) == pytest.approx(0.1)

    @given(st.lists(st.floats(1, 1e6), min_size=1, max_size=9))
    def test_the_middle_run_is_a_median(self, values):
        chosen = values[middle([figures(value) for value in values])]
        assert sum(value < chosen for value in values) <= (len(values) - 1) / 2
        assert sum(value > chosen for value in values) <= len(values) / 2

    def test_a_written_point_is_a_result_of_the_report(self, tmp_path):
        machine = Machine(lambda load: figures(), tp=8)
        for load in (Load.closed(4, WORKLOAD), Load.offline(50)):
            Store(tmp_path, {}).finish(load.name, machine.result(load, [machine.run(load)]))
        [offline, closed] = sorted(
            load_results([tmp_path])[0], key=lambda curve: len(curve.label), reverse=True
        )
        assert closed.hardware == "MI355X" and closed.gpus == 8 and closed.workload == "64/16"
        assert closed.points[0].tput_per_gpu == 900 / 8 and closed.points[0].concurrency == 4
        # mean in flight
        assert offline.label == f"{closed.label} offline" and offline.points[0].concurrency == 3


class TestSweep:
    def test_runs_each_point_and_states_the_spread(self, tmp_path):
        values = iter((100, 101, 103, 50, 60, 55))
        machine = Machine(lambda load: figures(next(values)))
        steady, unsteady = sweep(
            machine.open,
            [Load.closed(1, WORKLOAD), Load.closed(2, WORKLOAD)],
            Store(tmp_path, {}),
            3,
            Progress(),
        )
        assert (steady["tput_per_gpu"], steady["unstable"]) == (101, False) and steady[
            "spread"
        ] == pytest.approx(3 / 101)
        assert (unsteady["tput_per_gpu"], unsteady["unstable"]) == (55, True)  # 10/55 is above 4 %
        assert load_results([tmp_path])[0][0].points[1].note == "3 runs within 18.2 %; UNSTABLE"

    @pytest.mark.parametrize(
        ("lengths", "length", "apart"),
        [((None, None), None, None), ((3.0,), 3.0, None), ((2.0, 4.0, 2.5), 2.5, 0.8)],
    )
    def test_says_how_many_drafted_tokens_a_verification_gives(
        self, tmp_path, lengths, length, apart
    ):
        values = iter(lengths)
        machine = Machine(lambda load: figures(accept_length=next(values)))
        loads = [Load.closed(1, WORKLOAD)]
        (result,) = sweep(machine.open, loads, Store(tmp_path, {}), len(lengths), Progress())
        assert (result["accept_length"], result["accept_length_spread"]) == (length, apart)
        assert ("tokens a verification" in line("conc-1", result, False)) == bool(length)

    def test_a_finished_point_is_not_run_again(self, tmp_path):
        loads = [Load.closed(1, WORKLOAD), Load.closed(2, WORKLOAD)]
        first = Machine(lambda load: figures())
        sweep(first.open, loads[:1], Store(tmp_path, {"a": 1}), 1, Progress())
        second = Machine(lambda load: figures())
        told = []
        sweep(
            second.open,
            loads,
            Store(tmp_path, {"a": 1}),
            1,
            Progress(finished=lambda load, result, before: told.append((load.name, before))),
        )
        assert second.made == ["conc-2"] and told == [("conc-1", True), ("conc-2", False)]

    def test_no_server_is_opened_for_finished_points(self, tmp_path):
        load = Load.closed(1, WORKLOAD)
        sweep(Machine(lambda load: figures()).open, [load], Store(tmp_path, {}), 1, Progress())
        [result] = sweep(None, [load], Store(tmp_path, {}), 1, Progress())
        assert result["tput_per_gpu"] == 900

    def test_an_interrupted_point_keeps_its_finished_runs_and_is_no_result(self, tmp_path):
        calls = iter([figures(), figures()])

        def stops(load):
            made = next(calls, None)
            if made is None:
                raise KeyboardInterrupt
            return made

        load = Load.closed(1, WORKLOAD)
        with pytest.raises(KeyboardInterrupt):
            sweep(Machine(stops).open, [load], Store(tmp_path, {}), 3, Progress())
        assert not list(tmp_path.glob("*.json"))
        again = Machine(lambda load: figures())
        [result] = sweep(again.open, [load], Store(tmp_path, {}), 3, Progress())
        assert again.made == ["conc-1"] and result["repeat"] == 3
        assert [path.name for path in tmp_path.iterdir()] == ["conc-1.json"]

    def test_more_runs_are_added_to_those_made(self, tmp_path):
        load = Load.closed(1, WORKLOAD)
        sweep(Machine(lambda load: figures()).open, [load], Store(tmp_path, {}), 1, Progress())
        more = Machine(lambda load: figures())
        [result] = sweep(more.open, [load], Store(tmp_path, {}), 3, Progress())
        assert len(more.made) == 2 and result["repeat"] == 3

    def test_another_configuration_is_not_mixed_in(self, tmp_path):
        load = Load.closed(1, WORKLOAD)
        sweep(
            Machine(lambda load: figures()).open,
            [load],
            Store(tmp_path, {"server": "--tp 8", "same": 1}),
            1,
            Progress(),
        )
        with pytest.raises(
            BenchError, match="server was '--tp 8' and is '--tp 4'.*--out, or --again"
        ):
            sweep(None, [load], Store(tmp_path, {"server": "--tp 4", "same": 1}), 1, Progress())
        replaced = Machine(lambda load: figures(1.0))
        [result] = sweep(
            replaced.open,
            [load],
            Store(tmp_path, {"server": "--tp 4", "same": 1}, again=True),
            1,
            Progress(),
        )
        assert result["tput_per_gpu"] == 1.0

    def test_half_a_file_is_refused(self, tmp_path):
        (tmp_path / "conc-1.json").write_text('{"identity": {}, "ru')
        with pytest.raises(BenchError, match="no result of dsv4 bench"):
            sweep(None, [Load.closed(1, WORKLOAD)], Store(tmp_path, {}), 1, Progress())

    def test_a_sweep_taken_up_another_day_keeps_its_date(self, tmp_path):
        today = begun(tmp_path)
        (tmp_path / "conc-1.json").write_text(json.dumps({"date": "2026-05-02"}))
        (tmp_path / "other.json").write_text("[]")
        assert begun(tmp_path) == "2026-05-02" < today

    def test_a_run_that_compiled_is_made_again(self, monkeypatch):
        """The kernels of a first run are there in the second, which counts."""
        reports = [
            ActiveReport({"compiled after ready": count, "written": "x"}) for count in (0, 3, 3, 3)
        ]
        runs = iter((figures(100), figures(200)))
        monkeypatch.setattr(
            sweeping.client,
            "measure",
            lambda *_: SimpleNamespace(
                figures=(made := next(runs)),
                asked_output_tokens=100,
                command=[],
                document=lambda: {"figures": made},
            ),
        )
        active_report = SimpleNamespace(
            read=lambda: reports.pop(0), settled=lambda since: reports.pop(0)
        )
        bench = Bench(Server("http://x", "m", "m", "m"), WORKLOAD, active_report, {})
        run = bench.run(Load.closed(1, WORKLOAD))
        assert (
            run["figures"]["total_throughput"] == 200
            and "3 kernels were compiled" in run["discarded"]
            and run["warnings"] == []
        )


class TestLargestRate:
    @given(limit=st.floats(0.01, 200), start=st.floats(0.1, 20))
    @settings(max_examples=200)
    def test_finds_a_limit_within_the_tolerance(self, limit, start):
        """It never names a rate that failed, and none within 5 % above was seen to pass."""
        tried = {}
        found = largest_rate(lambda rate: tried.setdefault(rate, rate <= limit), start)
        assert found is not None and found <= limit < found * 1.0501
        assert tried[found] and len(tried) <= 16

    def test_none_passes(self):
        assert largest_rate(lambda rate: False, 1.0) is None

    def test_noise_does_not_make_it_endless(self):
        draw = random.Random(1)
        tried = []
        largest_rate(lambda rate: tried.append(rate) or draw.random() < 0.5, 1.0)
        assert len(tried) <= 16 and all(0 < rate < math.inf for rate in tried)

    def test_search_writes_the_best_trial_and_resumes(self, tmp_path):
        """TTFT grows with the rate and breaks its bound above 3 requests/s."""
        machine = Machine(
            lambda load: figures(tput=100 * load.rate, p99_ttft_ms=100 * load.rate, duration=30.0)
        )
        store = Store(tmp_path, {})
        result = search(machine, SLO(300, 50), 1.0, 20, store)
        assert 3 / 1.05 <= result["request_rate"] <= 3 and result["scenario"] == "poisson"
        assert result["tput_per_gpu"] == pytest.approx(100 * result["request_rate"])
        assert all(trial["keeps_bounds"] == (trial["rate"] <= 3) for trial in result["trials"])
        assert any("little more than the slowest" in warning for warning in result["warnings"])
        other = Machine(machine.measure)
        search(other, SLO(250, 50), 1.0, 20, store)
        assert not set(other.made) & set(machine.made)  # rates tried before serve the other bounds

    @pytest.mark.parametrize(
        "more, complaint",
        [
            (
                {"p99_ttft_ms": 301, "concurrency": 0.4},
                "hardly overlap, and the 99th percentile of TTFT is 301 ms",
            ),
            (
                {"p99_ttft_ms": 100, "duration": 201.0},
                "a higher rate would be the same load. Give more --prompts",
            ),
        ],
    )
    def test_a_trial_that_cannot_tell_ends_the_search(self, tmp_path, more, complaint):
        machine = Machine(lambda load: figures(**more))
        with pytest.raises(BenchError, match=complaint):
            search(machine, SLO(300, 50), 1.0, 20, Store(tmp_path, {}))
        assert len(machine.made) == 1

    def test_bounds_that_no_rate_keeps(self, tmp_path):
        with pytest.raises(
            BenchError, match="no rate down to .* keeps the 99th percentile of TTFT within 300 ms"
        ):
            search(
                Machine(lambda load: figures(p99_ttft_ms=301)),
                SLO(300, 50),
                1.0,
                20,
                Store(tmp_path, {}),
            )


def row(operator, implementation, calls=1, fallback=False, phase="decode"):
    return Row(operator, phase, "c4", "1", "", implementation, calls, {}, fallback)


class TestWarnings:
    def test_a_clean_run_has_none(self):
        report = ActiveReport({"compiled after ready": 2}, [row("moe", "triton", 10)])
        assert warnings(report, report, figures(), 100) == []

    def test_what_spoils_a_run(self):
        before = ActiveReport(
            {"compiled after ready": 2},
            [
                row("moe", "reference", 10, fallback=True),
                row("route", "reference", 5, fallback=True),
            ],
        )
        after = ActiveReport(
            {"compiled after ready": 5},
            [
                row("moe", "reference", 20, fallback=True),
                row("route", "reference", 5, fallback=True),
            ],
        )
        found = warnings(
            before,
            after,
            figures(cache_report={"total_cached_tokens": 256}, total_output_tokens=90),
            100,
        )
        assert len(found) == 4
        for part in (
            "3 kernels were compiled",
            "moe in decode fell back",
            "256 of 800 input tokens came from the prefix cache",
            "90 of 100 output tokens",
        ):
            assert any(part in warning for warning in found)

    def test_fallbacks_told_by_series(self):
        told = [
            ActiveReport(
                {"compiled after ready": 0, "fell back: moe": f"no gfx950 ({calls} calls)"},
                [row("moe", "reference")],
            )
            for calls in (3, 4)
        ]
        assert warnings(told[0], told[0], figures(), 100) == []
        assert "moe fell back" in warnings(*told, figures(), 100)[0]

    def test_a_server_without_a_report(self):
        assert "what ran is not known" in warnings(None, None, figures(), 100)[0]


class TestAblation:
    ROWS = [
        row("moe", "flydsl", 4),
        row("moe", "triton", 2, phase="prefill"),
        row("route", "triton", 3),
        row("compress", "reference", 9),
        row("topk_select", "triton", 0),
    ]

    def test_candidates_are_what_ran(self):
        assert ablation.candidates(self.ROWS) == {"moe": "flydsl, triton", "route": "triton"}

    @pytest.mark.parametrize(
        "asked, complaint",
        [
            (["mo"], "no operator 'mo'"),
            (["compress"], "compress runs its reference already; moe, route can be turned back"),
        ],
    )
    def test_wrong_choices(self, asked, complaint):
        with pytest.raises(BenchError, match=complaint):
            ablation.chosen(asked, ablation.candidates(self.ROWS))

    def test_nothing_to_ablate(self):
        with pytest.raises(BenchError, match="nothing to ablate"):
            ablation.chosen([], {})

    def test_ranking(self):
        """The baseline reads 1000 and, at the end, 980: a machine that drifts by 2 % cannot tell 1
        %."""
        measured = {None: 980, "moe": 495, "route": 980}

        def measure(operator):
            return {
                "tput_per_gpu": measured[operator],
                "median_tpot": 10 / measured[operator],
                "spread": None,
            }

        baseline = {"tput_per_gpu": 1000, "median_tpot": 0.01, "spread": None}
        worths, noise = ablation.ablate(
            measure, ["route", "moe"], {"moe": "flydsl", "route": "triton"}, baseline
        )
        assert noise == pytest.approx(20 / 990)
        assert [(worth.operator, worth.certain) for worth in worths] == [
            ("moe", True),
            ("route", False),
        ]
        assert worths[0].throughput_gain == pytest.approx(1.0) and worths[
            0
        ].tpot_saved == pytest.approx(10 / 495 - (0.01 + 10 / 980) / 2)

    def test_environment_without(self):
        changed = ablation.without(
            "moe",
            {"DSV4_MOE": "triton", "DSV4_LAYERS_MOE": "0-3", "DSV4_PROFILE": "safe", "A": "b"},
        )
        assert changed == {"DSV4_MOE": "reference", "DSV4_PROFILE": "safe", "A": "b"}

    def test_another_variable_insists(self):
        with pytest.raises(flags.FlagError, match="contradict"):
            ablation.without("sparse_mla", {"SGLANG_HACK_FLASHMLA_BACKEND": "triton"})


@pytest.mark.parametrize(
    "hw, unit", [("cpu", "900.0 tokens/s,"), ("mi355x", "900.0 tokens/s/GPU,")]
)
def test_a_point_of_a_cpu_names_no_gpu(hw, unit):
    run = figures()
    assert unit in line("c1", inferencex(run, 1) | {"hw": hw, "spread": None}, before=False)


class TestClient:
    def test_defaults_are_inferencex_s(self):
        words = client_command("http://x", "m", "/t", Load.closed(8, Workload()), Workload(), "out")
        pairs = dict(zip(words, words[1:]))
        assert {
            name: pairs[name]
            for name in (
                "--random-input-len",
                "--random-output-len",
                "--random-range-ratio",
                "--num-prompts",
                "--warmup-requests",
                "--max-concurrency",
                "--request-rate",
            )
        } == {
            "--random-input-len": "8192",
            "--random-output-len": "1024",
            "--random-range-ratio": "0.8",
            "--num-prompts": "80",
            "--warmup-requests": "16",
            "--max-concurrency": "8",
            "--request-rate": "inf",
        }
        assert "--disable-ignore-eos" not in words

    @pytest.mark.parametrize(
        "changes, complaint",
        [
            ({"osl": 1}, "--osl is 1"),
            ({"range_ratio": 0}, "--range-ratio is 0"),
            ({"isl": 0}, "--isl is 0"),
            ({"osl": 4, "range_ratio": 0.3}, "answers of one token"),
        ],
    )
    def test_wrong_workloads(self, changes, complaint):
        with pytest.raises(BenchError, match=complaint):
            Workload(**changes)

    def test_secrets_are_not_recorded(self):
        kept = environment.steering(
            {
                "DSV4_MOE": "triton",
                "SGLANG_API_KEY": "x",
                "HF_TOKEN": "x",
                "HOME": "/",
                "NCCL_DEBUG": "INFO",
            }
        )
        assert kept == {"DSV4_MOE": "triton", "NCCL_DEBUG": "INFO"}
        server = Server(
            "u",
            "m",
            "m",
            "t",
            {
                "api_key": "x",
                "tp_size": 8,
                "watermark_key": "<redacted>",
                "launch_command": "--model-path m --port 5 --tp-size 8",
            },
        )
        assert "api_key" not in server.safe_arguments() and server.safe_arguments()["tp_size"] == 8
        assert server.launch == "--model-path m --tp-size 8"

    def test_a_server_that_ends_is_quoted(self, tmp_path):
        words = ["sh", "-c", "echo 'dsv4: error: no such model' >&2; exit 2"]
        with pytest.raises(BenchError, match="ended with status 2; .*dsv4: error: no such model"):
            with started(words, {"PATH": "/bin:/usr/bin"}, tmp_path / "log", 30):
                pass


@pytest.mark.parametrize(
    "words, complaint",
    [
        ([], "give the address of a running server"),
        (["http://x", "--serve", "m"], "which stands alone"),
        (["http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9/v1/models"),
        (["http://127.0.0.1:9", "--ttft-ms", "5"], "give both"),
        (["http://127.0.0.1:9", "--conc", "1", "--offline", "5"], "give one of them"),
        (["http://127.0.0.1:9", "--repeat", "0"], "--repeat is 0"),
        (["http://127.0.0.1:9", "--ablate"], "--ablate starts servers of its own"),
        (
            ["--recipe", "mi355x-pro-tp8-mtp", "--arm", "dp"],
            "not served by this version: --speculative-algorithm",
        ),
        (
            ["--recipe", "mi355x-pro-disaggregated", "--arm", "router"],
            "one of several servers that run together",
        ),
        (["--serve", "--cpu tiny"], "begins with no model"),
    ],
)
def test_wrong_input(capsys, monkeypatch, tmp_path, words, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
