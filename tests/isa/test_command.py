"""python -m gfx950 FILE.hsaco"""

from __future__ import annotations

import struct
import subprocess
import sys

import msgpack
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


def refusal(path, monkeypatch, capsys) -> str:
    """What is said of a file that cannot be read: one line, which names it."""
    assert run(monkeypatch, path) == 2
    told = capsys.readouterr()
    begin = f"gfx950: error: {path}: "
    assert not told.out and told.err.startswith(begin) and told.err.count("\n") == 1
    return told.err.removeprefix(begin)


def elf(machine: int) -> bytes:
    """An ELF file of a machine, with no section."""
    return struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 64, 3, machine, *(1, 0, 0, 0, 0, 64, 0, 0),
        *(64, 0, 0),
    )  # fmt: skip


def test_files_that_are_not_there_or_no_files(tmp_path, monkeypatch, capsys):
    told = refusal(tmp_path / "none", monkeypatch, capsys)
    assert "No such file" in told and "give a .hsaco" in told
    told = refusal(tmp_path, monkeypatch, capsys)
    assert "Is a directory" in told and "give a .hsaco" in told


@pytest.mark.parametrize(
    ("content", "what", "way_out"),
    [
        (b"", "is empty", "give a code object"),
        (b"#!/bin/sh", "is no ELF file", "give a code object"),
        (b"\x7fELF\x02" + bytes(100), "cut off or damaged", "compile it again"),
        (elf(62), "is code of x64", "give the kernel's .hsaco"),
        (elf(224), "holds no kernel", "link a kernel"),
    ],
)
def test_other_files(content, what, way_out, tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernel.hsaco"
    path.write_bytes(content)
    told = refusal(path, monkeypatch, capsys)
    assert what in told and way_out in told


def test_a_file_cut_off_anywhere(hsaco):
    """Whichever byte is the last: what is left is refused, or nothing of it is missing."""
    whole = load(hsaco)["unmasked"]
    refused = 0
    for size in range(4, len(hsaco), 7):
        try:
            assert load(hsaco[:size])["unmasked"].code == whole.code
        except Unreadable as error:
            assert "compile it again" in str(error)
            refused += 1
    assert refused > len(hsaco) // 7 - 20


def test_other_gpus(hsaco, tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernel.hsaco"
    path.write_bytes(hsaco.replace(b"amdhsa--gfx950", b"amdhsa--gfx90a"))
    told = refusal(path, monkeypatch, capsys)
    assert "is code of gfx90a; compile the kernel for gfx942 or gfx950" in told


def test_no_kernel(hsaco, tmp_path, monkeypatch, capsys):
    """A list of kernels without any: msgpack's array of 1 becomes one of 0."""
    path, at = tmp_path / "kernel.hsaco", hsaco.index(b"amdhsa.kernels") + len("amdhsa.kernels")
    assert hsaco[at] == 0x91
    note = msgpack.packb({"amdhsa.target": "amdgcn-amd-amdhsa--gfx950", "amdhsa.kernels": []})
    begin = hsaco.index(b"AMDGPU\0\0") + 8
    size = int.from_bytes(hsaco[begin - 16 : begin - 12], "little")
    changed = bytearray(hsaco)
    changed[begin - 16 : begin - 12] = len(note).to_bytes(4, "little")
    changed[begin : begin + size] = note.ljust(size, b"\0")
    path.write_bytes(changed)
    assert "holds no kernel: its list" in refusal(path, monkeypatch, capsys)


WAIT, END = bytes.fromhex("700f8cbf"), bytes.fromhex("000081bf")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (WAIT, "ffffffff", "kernel unmasked: ffffffff"),  # an encoding that does not exist
        (WAIT, "010092bf", "does not implement: s_trap;"),
        (END, "000080bf", "the code ends and execution goes on"),  # s_endpgm becomes s_nop
    ],
)
def test_code_that_is_not_understood(old, new, what, hsaco, tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernel.hsaco"
    path.write_bytes(hsaco.replace(old, bytes.fromhex(new)))
    told = refusal(path, monkeypatch, capsys)
    assert what in told and ("compile it again" in told or "add each" in told)


def test_as_a_command(tmp_path):
    """The process itself: no traceback."""
    ran = subprocess.run(
        [sys.executable, "-m", "gfx950", tmp_path / "none"], capture_output=True, text=True
    )
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "No such file" in ran.stderr
