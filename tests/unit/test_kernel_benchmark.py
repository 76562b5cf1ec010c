"""benchmarks/kernels.py where no kernel runs: what it refuses, what it needs, its arithmetic and
its table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import floors  # noqa: E402
import kernel_cases  # noqa: E402
import kernel_timing  # noqa: E402
import kernels  # noqa: E402

from dsv4_plugin import flags  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "kernels.py"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

# Everything this project may depend on beyond torch, Triton and numpy; packaging is left, for
# pytest itself needs it.
BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError("not on a bare machine: " + name, name=name)
sys.meta_path.insert(0, Absent())
"""


def bare(code: str, **environ: str) -> subprocess.CompletedProcess:
    """Runs `code` in a process that cannot import any of this project's optional packages."""
    listed = re.findall(
        r'"([A-Za-z][\w-]*)',
        re.search(
            r"^dependencies = .*?(?=^\[project.scripts)",
            (ROOT / "pyproject.toml").read_text(),
            re.DOTALL | re.MULTILINE,
        )[0],
    )
    names = {name.lower().replace("-", "_") for name in listed} - {
        "numpy",
        "packaging",
        "pytest",
        "dsv4_plugin",
    }
    absent = names | {
        "yaml",
        "lm_eval",
        "sgl_kernel",
        "aiter",
        "flash_mla",
        "deep_gemm",
        "triton_kernels",
    }
    assert {"sglang", "safetensors", "rich", "transformers"} <= absent
    return subprocess.run(
        [sys.executable, "-c", BARE.format(absent=sorted(absent)) + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environ,
    )


def run_script(*words: str) -> str:
    return (
        f"import runpy\nsys.argv = ['kernels.py', *{list(words)}]\nrunpy.run_path({str(SCRIPT)!r},"
        " run_name='__main__')"
    )


@without_gpu
def test_without_a_gpu_it_says_what_to_do():
    done = bare(run_script(), TRITON_INTERPRET="0")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        len(done.stderr.splitlines()) == 1
        and "TRITON_INTERPRET=1 python benchmarks/kernels.py --check-only" in done.stderr
    )


@without_gpu
def test_a_bare_machine_checks_kernels():
    done = bare(
        run_script("--check-only", "topk_select", "rope_hadamard_quant", "--model", "flash-tp8"),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^4 right, 0 wrong, \d+ skipped, 0 left out", done.stdout, re.MULTILINE), (
        done.stdout
    )
    skipped = [line for line in done.stdout.splitlines() if "skipped, " in line and ":" in line]
    assert all(line.endswith("is not installed") for line in skipped), skipped


def test_names_of_profiles_without_a_yaml_reader():
    profile = next(flag for flag in flags.FLAGS if flag.name == "DSV4_PROFILE")
    assert profile.values == tuple(flags.profiles())


def test_a_bare_machine_collects_the_gpu_tests():
    done = bare(
        "import pytest\nsys.exit(pytest.main(['tests/gpu', '--collect-only', '-q', '-p',"
        " 'no:cacheprovider']))",
        TRITON_INTERPRET="0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {
        f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    }


@without_gpu
@pytest.mark.parametrize(
    ("words", "interpret", "named"),
    [
        (["--check-only", "topk"], "1", "no operator 'topk'; there are sparse_mla, "),
        (
            ["--check-only", "--model", "v3"],
            "1",
            "no model 'v3'; there are pro-tp8, pro-dp8, flash, flash-tp8",
        ),
        ([], "1", "add --check-only"),
        (["--markdown", "nowhere.json"], "0", "nowhere.json"),
    ],
)
def test_wrong_input_is_one_line(words, interpret, named, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert kernels.main(words) == 2
    err = capsys.readouterr().err
    assert named in err and len(err.splitlines()) == 1


def test_what_does_not_fit_is_named():
    """The largest step: 512 requests of a million tokens, 134 million entries of 584 bytes."""
    case = next(
        case
        for case in kernel_cases.cases(["sparse_mla"], ["pro-tp8"], kernel_cases.FULL)
        if case.label.startswith("decode 512 x 1048576, c4")
    )
    assert 512 * (1 << 18) * 584 < case.memory < 1.2 * 512 * (1 << 18) * 584
    bench = kernels.Bench(torch.device("cpu"), check_only=True, memory=20e9)
    bench.case(case)
    assert bench.report.rows == [] and bench.report.wrong == []
    assert re.fullmatch(
        r"needs \d+(\.\d+)? GB, 20 GB may be taken", bench.report.skipped[0]["reason"]
    )


def test_cases_are_all_asked_for_and_each_once():
    found = list(
        kernel_cases.cases(list(kernel_cases.NAMES), list(kernel_cases.MODELS), kernel_cases.FULL)
    )
    assert len({(case.operator, case.label) for case in found}) == len(found)
    attention = {case.label for case in found if case.operator == "sparse_mla"}
    for heads, topk in ((16, 1024), (128, 1024), (64, 512), (8, 512)):
        for batch in (1, 8, 32, 128, 512):
            assert f"decode {batch} x 131072, c4, {heads} heads, {128 + topk} slots" in attention
            assert f"decode {batch} x 1048576, c128, {heads} heads, {128 + 8192} slots" in attention
        assert f"prefill 8192, c4, {heads} heads, {128 + topk} slots" in attention
    assert "decode 512 x 1048576, top 1024" in {
        case.label for case in found if case.operator == "topk_select"
    }


PEAKS = kernel_timing.Peaks(copy=4e12, bf16=8e14, fp8=None)


def test_rates_by_hand():
    # 8 MB in 4 us are 2 TB/s, half of the copy; 0.4 GFLOP are 100 TFLOP/s and would take half a
    # microsecond.
    got = kernels.rates(4.0, floors.Floor(8_000_000, 400_000_000), PEAKS)
    assert got == pytest.approx(
        {
            "us": 4.0,
            "gb_s": 2000.0,
            "tflop_s": 100.0,
            "bound": "memory",
            "of_bound": 0.5,
            "over_floor": 2.0,
        }
    )
    # 3.2 GFLOP take 4 us at the peak of bf16, which stands in for FP8 where that was not measured.
    got = kernels.rates(5.0, floors.Floor(8_000_000, 3_200_000_000, "fp8"), PEAKS)
    assert got["bound"] == "products" and got["over_floor"] == pytest.approx(1.25)


def test_spread_by_hand():
    got = kernel_timing.spread([each * 1e-6 for each in (9, 1, 5, 3, 7, 2, 8, 4, 6, 10, 11)])
    assert (got.median, got.low, got.high, got.repeats) == pytest.approx((6, 2, 10, 11))


def test_wall_times_on_a_cpu():
    import time

    timer = kernel_timing.Timer(torch.device("cpu"), flush_bytes=1 << 20)
    got = timer.times(lambda: time.sleep(0.002))
    assert got.graph_cold is None and got.no_graph == "no GPU" and got.best_cold is got.cold
    assert 2000 <= got.warm.low <= got.warm.median <= got.warm.high and got.warm.repeats >= 7
    peaks = timer.peaks()
    assert peaks.copy > 0 and peaks.bf16 > 0 and peaks.products("fp8") == peaks.bf16


def result() -> dict:
    """A result as a run writes it, from made-up times: what is tested is the form."""

    def times(us: float) -> dict:
        return asdict(
            kernel_timing.Times(
                *(
                    kernel_timing.Spread(us * factor, us * factor * 0.9, us * factor * 1.1, 30)
                    for factor in (2.0, 1.5, 1.0, 0.5)
                )
            )
        )

    floor = floors.Floor(8_000_000, 400_000_000)
    row = {
        "operator": "sparse_mla",
        "implementation": "gluon",
        "model": "pro-tp8",
        "case": "decode 32 x 8192, c4",
        "check": {},
        "floor": asdict(floor),
        "times": times(4.0),
        **kernels.rates(4.0, floor, PEAKS),
        "peers": [
            {"name": "flash_mla", "note": "the same pages", "times": times(6.0), "ratio": 1.5},
            {"name": "other", "absent": "not installed"},
        ],
    }
    place = {
        "device": "A GPU",
        "arch": "gfx950",
        "driver": "ROCm 7",
        "torch": "2",
        "triton": "3",
        "dsv4_plugin": "0.1.0",
        "commit": "abc",
        "date": "2026-01-01",
    }
    return {
        "environment": place,
        "options": {},
        "peaks": asdict(PEAKS),
        "rows": [row],
        "wrong": [],
        "skipped": [],
        "left_out": ["x, y"],
    }


def test_markdown_says_what_the_file_says(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(result()))
    assert kernels.main(["--markdown", str(path)]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    names, cells = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[2])
    )
    assert dict(zip(names, cells, strict=True)) == {
        "operator": "sparse_mla",
        "kernel": "gluon",
        "share": "pro-tp8",
        "call": "decode 32 x 8192, c4",
        "µs cold": "4.0 ±10%",
        "µs warm": "2.0",
        "µs with launches": "6.0",
        "GB/s": "2000",
        "TFLOP/s": "100.0",
        "of bound": "50% memory",
        "× floor": "2.00",
        "peers": "flash_mla 1.50×",
    }
    assert "Copy 4000 GB/s, bf16 product 800 TFLOP/s." in text and "Left out: 1 cases." in text
    assert "flash_mla: the same pages." in text and "other is absent: not installed." in text


def test_checks_alone_make_no_table(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({key: value for key, value in result().items() if key != "peaks"}))
    assert kernels.main(["--markdown", str(path)]) == 2
    assert "holds checks and no times" in capsys.readouterr().err


@without_gpu
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "FOLDER receives"),
        (["out", "ten"], "'ten', not a whole number"),
        (["out"], "no torch that sees a GPU"),
    ],
)
def test_the_session_script_refuses(words, named, tmp_path):
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_session.sh", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.returncode == 2 and named in done.stdout + done.stderr
