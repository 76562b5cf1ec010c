"""The `dsv4` command: finding subcommands, and wrong input as one line and status 2."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dsv4_plugin import cli
from dsv4_plugin.config import Geometry
from dsv4_plugin.spelling import suggestion


def run(capsys, *argv: str) -> tuple[int, str, str]:
    try:
        status = cli.main(argv)
    except SystemExit as leaving:  # argparse leaves by itself
        status = leaving.code
    return status, *capsys.readouterr()


def test_help_names_every_command(capsys):
    status, out, err = run(capsys, "--help")
    assert (status, err) == (0, "")
    assert "  tiny" in out and "small random checkpoint" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from dsv4_plugin.cli import main; main(['--help']); "
        "sys.exit(bool({'torch', 'sglang', 'triton', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_no_command(capsys):
    status, out, _ = run(capsys)
    assert status == 2 and "commands:" in out


def test_unknown_command(capsys):
    status, out, err = run(capsys, "tinny", "x")
    assert (status, out) == (2, "")
    assert err == "dsv4: error: no command 'tinny'; did you mean tiny?\n"


def test_tiny_writes(capsys, tmp_path):
    status, out, err = run(
        capsys,
        "tiny",
        str(tmp_path / "model"),
        "--compress-ratios",
        "0,4",
        "--hidden",
        "128",
        "--experts",
        "4",
        "--seed",
        "3",
        "--shard-size",
        "2",
    )
    assert (status, err) == (0, "")
    assert "2 layers" in out
    assert Geometry.from_dir(tmp_path / "model").compress_ratios == (0, 4, 0)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1


def test_tiny_with_wide_experts(capsys, tmp_path):
    options = ["--layers", "1", "--hidden", "128", "--experts", "2", "--experts-per-token", "1"]
    path = tmp_path / "model"
    assert run(capsys, "tiny", str(path), *options, "--intermediate", "384")[0] == 0
    assert Geometry.from_dir(path).moe_intermediate_size == 384


def test_tiny_with_a_dspark_draft(capsys, tmp_path):
    options = ["--layers", "3", "--hidden", "128", "--experts", "4", "--dspark"]
    status, _, err = run(capsys, "tiny", str(tmp_path / "model"), *options)
    assert (status, err) == (0, "")
    dspark = Geometry.from_dir(tmp_path / "model").dspark
    assert (dspark.stages, dspark.block_size, dspark.target_layer_ids) == (3, 5, (0, 1, 2))


@pytest.mark.parametrize(
    "options, told",
    [
        (["--hidden", "100"], "hidden is 100"),
        (["--intermediate", "192"], "intermediate is 192"),
        (["--layers", "3", "--compress-ratios", "0,4"], "2 compress ratios for 3 layers"),
        (["--compress-ratios", "0,5"], "compress_ratios holds [5]"),
        (["--shard-size", "0"], "--shard-size is 0 MB"),
    ],
)
def test_wrong_option_is_one_line(capsys, tmp_path, options, told):
    status, out, err = run(capsys, "tiny", str(tmp_path / "model"), *options)
    assert (status, out) == (2, "")
    assert err.startswith("dsv4: error: ") and told in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_directory_in_use_is_one_line(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    status, _, err = run(capsys, "tiny", str(tmp_path))
    assert status == 2
    assert (
        err == f"dsv4: error: {tmp_path} is not empty; name another directory, or give --force to"
        " replace the checkpoint in it\n"
    )


def test_unknown_option(capsys, tmp_path):
    status, _, err = run(capsys, "tiny", str(tmp_path / "model"), "--colour", "blue")
    assert status == 2 and "--colour" in err


def test_defect_keeps_its_traceback(capsys, monkeypatch):
    from dsv4_plugin.cli import tiny

    def broken(arguments):
        raise KeyError("defect")

    monkeypatch.setattr(tiny, "run", broken)
    with pytest.raises(KeyError):
        cli.main(["tiny", "x"])


def test_missing_package_names_the_remedy(capsys, monkeypatch, tmp_path):
    # None makes its import fail as if it were not installed
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, _, err = run(
        capsys, "tiny", str(tmp_path / "model"), "--layers", "1", "--hidden", "128"
    )
    assert status == 2
    assert "tokenizers" in err and "pip install" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "module, remedy",
    [
        ("matplotlib.pyplot", "dsv4_plugin[bench]"),
        ("lm_eval", "dsv4_plugin[bench]"),
        ("flydsl", "dsv4_plugin[flydsl]"),
        ("sglang.srt", "dsv4_plugin[host]"),
        ("yaml", "install dsv4_plugin brings"),
    ],
)
def test_a_missing_package_is_brought_by_the_extra_that_lists_it(
    module, remedy, monkeypatch, capsys
):
    def refuse(name):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli.importlib, "import_module", refuse)
    assert cli.main(["report"]) == 2
    assert (
        f"the Python package {module}, which is not installed" in (said := capsys.readouterr().err)
        and remedy in said
    )


def test_version(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out.split() == ["dsv4_plugin", cli.version()]


def test_the_package_is_the_command():
    ran = subprocess.run(
        [sys.executable, "-m", "dsv4_plugin", "tinny"], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (2, "") and "did you mean tiny?" in ran.stderr


@pytest.mark.parametrize("words", [["flags"], ["--help"], ["recipe", "list"]])
def test_a_reader_that_leaves_is_no_error(words):
    """As `dsv4 flags | head -1` does, here before a byte is written."""
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [sys.executable, "-m", "dsv4_plugin", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("module", ["torch", "triton", "aiter"])
def test_what_pypi_would_bring_wrongly_is_not_advised(module, capsys, monkeypatch):
    def missing(arguments):
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr("dsv4_plugin.cli.flags.run", missing)
    status, _, err = run(capsys, "flags")
    assert status == 2 and f"needs the Python package {module}" in err
    assert "pip install" not in err and "ROCm" in err


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sevre", "did you mean serve?"), ("qqqq", "there are one, serve"), ("", "there are one")],
)
def test_only_a_near_name_is_suggested(name, hint):
    assert suggestion(name, ["one", "serve"]).startswith(hint)


def test_a_common_prefix_makes_no_name_near():
    known = ["DSV4_MOE", "DSV4_REPORT"]
    assert suggestion("DSV4_QQQQ", known, "see the table", "DSV4_") == "see the table"
    assert suggestion("DSV4_MOEE", known, "see the table", "DSV4_") == "did you mean DSV4_MOE?"


def test_recipe_run_needs_no_dsv4_on_the_path():
    ran = subprocess.run(
        [sys.executable, "-m", "dsv4_plugin", "recipe", "run", "cpu-tiny"]
        + ["--model-path", "/nosuch/model"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": "/nosuch"},
    )
    assert ran.returncode == 2 and "/nosuch/model" in ran.stderr.splitlines()[-1]


def test_a_misspelled_directory_of_recipes(capsys, tmp_path):
    for verb in (["list"], ["show", "x"], ["check"]):
        status, _, err = run(capsys, "recipe", *verb, "--dir", str(tmp_path / "recipse"))
        assert status == 2 and err.endswith("recipse is no directory\n")
    status, _, err = run(capsys, "recipe", "list", "--dir", str(tmp_path))
    assert status == 2 and "holds no recipe" in err


def test_an_eval_file_is_tried_before_the_work(capsys, tmp_path):
    status, _, err = run(capsys, "eval", "--tiny", "--quick", "--json", str(tmp_path))
    assert status == 2 and f"{tmp_path} is a directory; give a file" in err


def test_roofline_says_that_weights_do_not_fit(capsys):
    """pro has 862 GB of released weights: 215 GB on each of four GPUs of 192 GB."""
    _, out, _ = run(capsys, "roofline", "--gpu", "MI300X", "--layout", "tp4")
    assert "The weights do not fit: MI300X has 192 GB" in out and "Best possible" not in out
    assert max(len(line.rstrip()) for line in out.splitlines()[2:]) <= 80
    _, out, _ = run(capsys, "roofline", "--gpu", "MI300X", "--layout", "tp8")
    assert "do not fit" not in out and "Best possible curve" in out
