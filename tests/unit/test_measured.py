"""Times that `dsv4 verify --time` keeps: which it adds up, when they are used, and that `auto`
follows them."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from dsv4_plugin import device, measured
from dsv4_plugin.cli import main
from dsv4_plugin.ops import operator as selection
from dsv4_plugin.ops.operator import HERE, Implementation
from dsv4_plugin.runtime import compare
from dsv4_plugin.runtime.verify import Result, Skipped, implementation_seconds

TIMES = {
    "moe": {
        "decode": {"triton": 2.0, "flydsl": 1.0},
        "prefill": {"triton": 3.0, "flydsl": 4.0},
    }
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with an MI355X, whose times are kept in a folder of the test's."""
    facts = {"device": "AMD Instinct MI355X", "triton": "3.8.0"}
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(device, "arch", lambda: "gfx950")
    monkeypatch.setattr(measured, "machine", lambda: facts)
    measured.read.cache_clear()
    yield facts
    measured.read.cache_clear()


@pytest.fixture
def moe(monkeypatch):
    """An operator of two implementations, the second of which was never measured."""
    kept = dict(selection.OPERATORS)
    module = types.ModuleType("times_two")
    module.two, module.three = (lambda x: x * 2), (lambda x: x * 3)
    monkeypatch.setitem(sys.modules, "times_two", module)

    @selection.operator
    def moe(x):
        return x * 1

    moe.add(Implementation("triton", "times_two:two"))
    moe.add(Implementation("flydsl", "times_two:three", measured=False))
    yield moe
    selection.OPERATORS.update(kept)


class Resident(torch.Tensor):
    """A CPU tensor that says it is on the GPU."""

    @property
    def is_cuda(self):
        return True


def ran(moe, phase: str) -> float:
    before, HERE.phase = HERE.phase, phase
    try:
        return moe(torch.ones(2, 2).as_subclass(Resident)).mean().item()
    finally:
        HERE.phase = before


def test_auto_follows_the_times_of_each_phase(machine, moe):
    moe.configure()
    assert ran(moe, "decode") == 2
    measured.write(TIMES)
    moe.configure()
    assert ran(moe, "decode") == 3
    assert ran(moe, "prefill") == 2


def test_what_was_never_measured_runs_only_where_it_is_named(machine, moe, monkeypatch):
    moe.add(Implementation("triton", "times_two:two", requires=lambda x: "rows are odd"))
    moe.configure()
    assert ran(moe, "decode") == 1
    [row] = moe.rows()
    assert row.rejected == {
        "triton": "rows are odd",
        "flydsl": "its speed is not known here; dsv4 verify --time measures it",
    }
    monkeypatch.setenv("DSV4_MOE", "flydsl")
    moe.configure()
    assert ran(moe, "decode") == 3


def test_times_of_other_versions_are_not_used(machine, monkeypatch):
    where = measured.write(TIMES)
    assert measured.read() == (TIMES, None)
    monkeypatch.setattr(measured, "machine", lambda: machine | {"triton": "3.9.0"})
    measured.read.cache_clear()
    seconds, why = measured.read()
    assert not seconds and "triton 3.8.0, here 3.9.0" in why and str(where) in why
    measured.write(TIMES)
    assert measured.read() == (TIMES, None)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        json.dumps({"machine": {}, "seconds": {"moe": {"decode": {"a": 1, "b": ""}}}}),
    ],
)
def test_a_file_that_holds_no_times_is_said(machine, content):
    measured.write({}).write_text(content)
    seconds, why = measured.read()
    assert not seconds and "holds no times" in why


def test_without_a_gpu_nothing_is_read_or_measured(machine, monkeypatch, capsys):
    measured.write(TIMES)
    monkeypatch.setattr(device, "arch", lambda: device.CPU)
    measured.read.cache_clear()
    assert measured.read() == ({}, None)
    assert main(["verify", "--time"]) == 2
    assert "--time: there is no GPU here" in capsys.readouterr().err


def test_calls_that_all_took_are_added_up():
    def check(name, case, seconds, error=0.0, phase="decode"):
        return Result("moe", name, case, error, compare.BF16, seconds, phase=phase)

    assert implementation_seconds(
        [
            check("triton", "a", 1.0),
            check("triton", "b", 2.0),
            check("triton", "c", 4.0),
            check("triton", "a, eager", 50.0, phase=""),
            check("flydsl", "a", 0.5),
            check("flydsl", "c", 0.25),
            Skipped("moe", "flydsl", "b: rows are odd"),
            check("aiter", "a", 0.1),
            check("aiter", "c", 0.1, error=float("inf")),
        ]
    ) == {"moe": {"decode": {"triton": 5.0, "flydsl": 0.75}}}
