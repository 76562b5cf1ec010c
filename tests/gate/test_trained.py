"""The trained checkpoint: it keeps its margins as it is, and every fault of faults.py falls below
one."""

from __future__ import annotations

import json

import pytest

from dsv4_plugin.accuracy import gate
from dsv4_plugin.accuracy.eval_set import SHORT, build_eval_set, measure
from dsv4_plugin.cli import main
from dsv4_plugin.config import Geometry, Precision

from . import faults

DIRECTORY = gate.checkpoint_directory()


@pytest.fixture(scope="module")
def eval_set():
    return build_eval_set(DIRECTORY, Geometry.from_dir(DIRECTORY).bos_token_id, SHORT)


def answered(eval_set, precision=Precision.EXACT):
    return measure(gate.load_engine(DIRECTORY, precision, "cpu", eval_set.longest), eval_set)


@pytest.fixture(scope="module")
def reference(eval_set):
    return answered(eval_set)


def below(measured, reference) -> dict[str, float]:
    rows = list(gate.judge("under test", measured, reference))
    print("; ".join(f"{row.measure} {row.value:.4f}" for row in rows if row.why))
    return {row.measure: row.value for row in rows if not row.passed}


@pytest.mark.parametrize("precision", list(Precision), ids=lambda precision: precision.value)
def test_a_sound_model_keeps_its_margins(eval_set, reference, precision):
    """Else a fault that falls below one would show nothing."""
    assert not below(answered(eval_set, precision), reference)


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.__name__)
def test_the_gate_catches(eval_set, reference, fault):
    with fault():
        measured = answered(eval_set)
    assert below(measured, reference), f"{fault.__name__} keeps every margin"


def test_without_ratio_4_far_recall_is_chance(eval_set, reference):
    """The window ends after 128 tokens and an entry of 128 tokens holds no single word: nothing
    else reaches 1k."""
    with faults.ratio_4_branch_off():
        far = answered(eval_set).recall[1024]
    # One in 64 things; four times that is what 24 trials can tell from chance.
    assert far.value <= 1 / 16 and far.interval[0] <= 1 / 64
    assert reference.recall[1024].interval[0] > 1 / 2


def test_zero_flags(tmp_path, capsys):
    """What a user gets from `dsv4 eval --tiny`, out to twice the trained length."""
    status = main(["eval", "--tiny", "--json", str(tmp_path / "gate.json")])
    said = capsys.readouterr().out
    print(said)
    written = json.loads((tmp_path / "gate.json").read_text())
    assert status == 0 and written["passed"], said
    assert [each["precision"] for each in written["settings"]][0] == "exact"
    assert {each["precision"] for each in written["settings"]} == {each.value for each in Precision}
    assert all(
        "recall, 8k" in {row["measure"] for row in each["rows"]} for each in written["settings"]
    )
