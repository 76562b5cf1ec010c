"""The trained checkpoint recalls what it was told a thousand tokens before with every Triton kernel
at once: attention, experts, hyper-connections, norms and products of packed matrices."""

from __future__ import annotations

import test_golden_dense
import test_golden_experts
import torch
import torch.nn.functional as F
from test_golden import KERNELS

from dsv4_plugin import flags
from dsv4_plugin.accuracy import gate
from dsv4_plugin.accuracy.eval_set import EvalSize, build_eval_set
from dsv4_plugin.accuracy.gate import chosen
from dsv4_plugin.config import Precision
from dsv4_plugin.ops import operator

FAR = EvalSize(((1024, 1, 8),), windows=1, window=128)
TAIL = 4
"""Tokens before the first thing, its cue among them, that kernels compute as well; as many at the
end are decoded singly."""


EVERY = (*KERNELS, *test_golden_experts.KERNELS, *test_golden_dense.KERNELS)
TRITON = chosen({}, operators=[f"{name}=triton" for name in EVERY])


def test_things_are_recalled_by_kernels(monkeypatch):
    """References read the text, which interpreted kernels would take minutes for; kernels read the
    questions after it."""
    monkeypatch.setenv("DSV4_WEIGHTS", "packed")
    directory = gate.checkpoint_directory()
    engine = gate.load_engine(directory, Precision.SERVING, "cpu", max_tokens=4096)
    [asked] = build_eval_set(directory, engine.model.geometry.bos_token_id, FAR).documents[1024]
    begin = asked.things[0][0] - TAIL
    rest = (asked.ids[begin:-TAIL], *([token] for token in asked.ids[-TAIL:]))

    def answer(environment: dict[str, str]) -> torch.Tensor:
        """Log-probabilities [rows, vocab] after the text."""
        sequence = engine.open()
        with gate.selected(gate.REFERENCES):
            engine.forward([(sequence, asked.ids[:begin])])
        with gate.selected(environment):
            streams = torch.cat([engine.forward([(sequence, tokens)]) for tokens in rest])
            logits = engine.logits(streams)
            ran = {(row.operator, row.implementation) for row in operator.report_rows()}
        engine.close(sequence)
        wanted = {(name, flags.implementation(name, environment).value) for name in EVERY}
        assert wanted <= ran
        return logits.log_softmax(-1)

    found = answer(TRITON)
    things, best = [at - 1 - begin for at, _ in asked.things], found.argmax(-1).tolist()
    assert [
        tuple(best[row : row + len(thing)]) for row, (_, thing) in zip(things, asked.things)
    ] == [thing for _, thing in asked.things]
    moved = F.kl_div(
        found[things], answer(gate.REFERENCES)[things], log_target=True, reduction="batchmean"
    )
    print(f"nats from the references: {moved:.2g}")
    assert moved < gate.MARGINS["divergence of things"].limit
