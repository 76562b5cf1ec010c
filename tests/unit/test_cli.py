"""The `dsv4` command: finding subcommands, and wrong input as one line and status 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dsv4_plugin import cli
from dsv4_plugin.config import Geometry


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
        ("torch", "dsv4_plugin[host]"),
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
