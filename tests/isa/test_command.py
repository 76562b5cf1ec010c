"""python -m gfx950 FILE.hsaco"""

from __future__ import annotations

import sys

import pytest
import sample_kernels as kernels
import torch

from gfx950 import __main__ as command
from gfx950.code_object import Unreadable, load
from gfx950.triton_driver import executing


@pytest.fixture(scope="module")
def hsaco() -> bytes:
    with executing(run=False) as launches:
        kernels.unmasked[(1,)](torch.zeros(256), torch.zeros(256), B=256)
    return launches[0].hsaco


def run(monkeypatch, *files) -> int:
    monkeypatch.setattr(sys, "argv", ["gfx950", *map(str, files)])
    return command.main()


def test_says_what_is_in_a_file(hsaco, tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernel.hsaco"
    path.write_bytes(hsaco)
    assert run(monkeypatch, path) == 0
    told = capsys.readouterr().out
    for part in ("unmasked for gfx950", "vector registers", "1 load", "1 store", "0 hazards"):
        assert part in told


def test_a_wait_that_is_missing(hsaco, tmp_path, monkeypatch, capsys):
    """The wait for vector memory becomes an s_nop, in the file itself."""
    kernel = load(hsaco)["unmasked"]
    wait = (0xBF8C0F70).to_bytes(4, "little")  # s_waitcnt vmcnt(0)
    assert kernel.code.count(wait) == 1
    path = tmp_path / "kernel.hsaco"
    path.write_bytes(hsaco.replace(wait, (0xBF800000).to_bytes(4, "little")))
    assert run(monkeypatch, path) == 1
    told = capsys.readouterr().out
    assert "1 hazards" in told and "sample_kernels.py:" in told and "load arrived" in told


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh", b"\x7fELF\x02" + bytes(100)])
def test_other_files(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernel.hsaco"
    path.write_bytes(content)
    assert run(monkeypatch, path) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"gfx950: error: {path}: ") and told.count("\n") == 1
    with pytest.raises(Unreadable):
        load(content)


def test_a_file_that_is_not_there(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path / "none") == 2
    assert "No such file" in capsys.readouterr().err
