"""Lower bounds of verification and draft against a table that was calculated apart, and against
sums by hand."""

from __future__ import annotations

import pytest

from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.checkpoint.schema import expected_tensors
from dsv4_plugin.cli import main
from dsv4_plugin.roofline.hardware import Hardware
from dsv4_plugin.roofline.layout import Layout
from dsv4_plugin.roofline.limit import Workload, limit_points
from dsv4_plugin.roofline.memory import resident
from dsv4_plugin.roofline.speculation import speculation
from dsv4_plugin.roofline.step import decode_step

PRO, FLASH = load_geometry("pro-0813"), load_geometry("flash-0731")
MI355X, TP8 = Hardware.named("MI355X"), Layout.parse("tp8")


def weight_seconds(step) -> float:
    """Time to read the matrices at full bandwidth."""
    return sum(c.memory_seconds(MI355X) for c in step.components if c.kind == "weights")


@pytest.mark.parametrize(
    "batch, plain, verify, draft, token",
    [(1, 1.01, 1.96, 0.13, 0.58), (8, 2.33, 7.62, 0.38, 2.21), (32, 5.89, 13.0, 0.67, 3.79)],
)
def test_weights_of_pro_as_calculated_apart(batch, plain, verify, draft, token):
    """ms at 8 TB/s and an accepted length of 3.61, three digits, its own rounding of experts."""
    found = speculation(PRO, MI355X, TP8, batch, 8192, 3.61)
    assert 1e3 * weight_seconds(decode_step(PRO, MI355X, TP8, batch, 8192)) == pytest.approx(
        plain, rel=0.01
    )
    assert 1e3 * weight_seconds(found.verify) == pytest.approx(verify, rel=0.01)
    assert 1e3 * weight_seconds(found.draft) == pytest.approx(draft, rel=0.05)
    both = weight_seconds(found.verify) + weight_seconds(found.draft)
    assert 1e3 * both / 3.61 == pytest.approx(token, rel=0.01)


def test_a_draft_of_a_full_batch_reads_every_expert_of_its_stages():
    draft = speculation(FLASH, MI355X, TP8, 4096, 8192, 3.0).draft
    stored = sum(
        spec.nbytes
        for name, spec in expected_tensors(FLASH).items()
        if name.startswith("mtp.") and spec.expert is not None
    )
    [experts] = [c for c in draft.components if c.name == "routed_experts"]
    assert experts.bytes == pytest.approx(stored / 8, rel=1e-3)
    [markov] = [c for c in draft.components if c.name == "markov_head"]
    # w2, a row of w1 aside, once for each of five tokens
    assert markov.bytes == pytest.approx(5 * 129280 * 256 * 2 / 8)


def test_a_verification_is_six_rows_and_reads_caches_once():
    verify = speculation(PRO, MI355X, TP8, 4, 8192, 3.0).verify
    plain, rows = decode_step(PRO, MI355X, TP8, 4, 8192), decode_step(PRO, MI355X, TP8, 24, 8192)
    of = {c.name: c for c in verify.components}
    for component in plain.components:
        if component.kind == "caches":
            assert of[component.name].bytes == component.bytes
            assert sum(of[component.name].flops.values()) == 6 * sum(component.flops.values())
    for component in rows.components:
        if component.kind == "weights":
            assert of[component.name] == component


def test_the_curve_with_a_draft():
    workload = Workload.nominal(8192, 1024)
    plain, drafting = (
        limit_points(PRO, MI355X, [TP8], workload, (1, 32), accepted_length=length)
        for length in (None, 3.61)
    )
    for without, point in zip(plain, drafting):
        found = point.speculation
        assert point.decode_seconds == (found.verify.seconds + found.draft.seconds) / 3.61
        assert point.prefill_seconds == without.prefill_seconds
        assert point.tpot < without.tpot
    # Weights of the draft take their room.
    assert resident(PRO, TP8, draft=True) - resident(PRO, TP8) == pytest.approx(5.6e9, rel=0.1)


@pytest.mark.parametrize(
    "words, told",
    [
        (["--model", "pro", "--accepted-length", "3"], "has no DSpark draft"),
        (["--model", "pro-0813", "--accepted-length", "7"], "gives 1 to 6 tokens"),
        (["--model", "pro-0813", "--accepted-length", "3", "--prefill"], "of decode steps"),
    ],
)
def test_wrong_options(words, told, capsys):
    assert main(["roofline", *words]) == 2
    assert told in capsys.readouterr().err


def test_the_command_prints_it(capsys):
    assert main(["roofline", "--model", "pro-0813", "--accepted-length", "3.61"]) == 0
    said = capsys.readouterr().out
    assert "With the draft, 3.61 tokens a verification, ms" in said and "gain" in said
