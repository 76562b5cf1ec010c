"""The trained checkpoint recalls what it was told a thousand tokens before by machine code of
gfx950: attention, indexer and hyper-connections in TileLang, executed."""

from __future__ import annotations

import executions
import pytest
import tilelang_launches
import torch

from dsv4_plugin.accuracy import gate
from dsv4_plugin.accuracy.eval_set import EvalSize, build_eval_set
from dsv4_plugin.accuracy.gate import chosen
from dsv4_plugin.config import Precision
from dsv4_plugin.ops import operator

if reason := tilelang_launches.missing():
    pytest.skip(reason, allow_module_level=True)

EVERY = ("sparse_mla", "indexer_logits", "mhc_pre", "mhc_post", "mhc_post_pre")
TILELANG = gate.REFERENCES | chosen({}, operators=[f"{name}=tilelang" for name in EVERY])
ROWS = 4
"""Tokens before the thing, its cue among them: what is executed in one step."""


@pytest.fixture
def executed(monkeypatch):
    """TileLang's implementations take tensors that are on no GPU: the executor reads those."""
    against = operator.Operator._against

    def without_a_gpu(self, implementation, wanted, x, args, kwargs):
        if implementation.name != "tilelang":
            return against(self, implementation, wanted, x, args, kwargs)
        return implementation.requires(*args, **kwargs), True

    monkeypatch.setattr(operator.Operator, "_against", without_a_gpu)


@pytest.mark.thorough
def test_a_thing_is_recalled_by_machine_code(executed):
    directory = gate.checkpoint_directory()
    engine = gate.load_engine(directory, Precision.SERVING, "cpu", max_tokens=4096)
    far = EvalSize(((1024, 1, 8),), windows=1, window=128)
    [asked] = build_eval_set(directory, engine.model.geometry.bos_token_id, far).documents[1024]
    at, (thing, *_) = asked.things[0]

    def answer(environment: dict[str, str]) -> tuple[torch.Tensor, set[tuple[str, str]]]:
        """(log-probabilities [vocab] of the thing, (operator, implementation) of what ran)."""
        sequence = engine.open()
        with gate.selected(gate.REFERENCES):
            engine.forward([(sequence, asked.ids[: at - ROWS])])
        with executions.chip("gfx950"), gate.selected(environment):
            streams = engine.forward([(sequence, asked.ids[at - ROWS : at])])
            ran = {(row.operator, row.implementation) for row in operator.report_rows()}
        with gate.selected(gate.REFERENCES):
            logits = engine.logits(streams[-1:])[0]
        engine.close(sequence)
        return logits.log_softmax(-1), ran

    found, ran = answer(TILELANG)
    assert {(name, "tilelang") for name in EVERY if name != "mhc_pre"} <= ran
    assert found.argmax() == thing
    expected, _ = answer(gate.REFERENCES)
    moved = (found.exp() * (found - expected)).sum()
    print(f"nats from the references: {moved:.2g}")
    assert abs(moved) < gate.MARGINS["divergence of things"].limit
