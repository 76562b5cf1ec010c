"""Whole steps on a GPU: the trained checkpoint against a CPU, captured steps against eager ones,
and nothing in a decode step that waits for the device."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.runtime import Engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRAINED = Path(__file__).parents[2] / "checkpoints" / "tiny"
_random = random.Random(5)
PROMPTS = [[_random.randrange(4, 2000) for _ in range(length)] for length in (7, 130, 300)]
"""From there on 24 tokens close windows of 4 and of 128 tokens and cross a page; the last selects
64 of its entries."""


def loaded(precision: str, device: str) -> DeepseekV4:
    from dsv4_plugin.checkpoint.load import load_checkpoint  # a bare machine may lack safetensors

    model = DeepseekV4(
        Geometry.from_dir(TRAINED), Precision(precision), device=device, parts="backbone"
    )
    load_checkpoint(model, TRAINED)
    return model


@pytest.fixture(scope="module", params=["exact", "official", "serving"])
def model(request):
    return loaded(request.param, "cuda")


def begun(model) -> tuple[Engine, list]:
    """An engine and sequences that hold all prompts but for the last token."""
    engine = Engine(model, max_tokens=2048, max_requests=4)
    sequences = [engine.open() for _ in PROMPTS]
    for sequence, prompt in zip(sequences, PROMPTS):
        engine.forward([(sequence, prompt[:-1])])
    return engine, sequences


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Of the next token's distribution, mean over tokens."""
    want, got = reference.log_softmax(-1), logits.cpu().log_softmax(-1)
    return (want.exp() * (want - got)).sum(-1).mean()


def test_logits_are_as_near_as_those_of_the_cpu(model, monkeypatch):
    """Divergence from `exact` on the CPU beside that of the same roundings there: FP8 matrices and
    activations, as a GPU has them."""
    monkeypatch.setenv("DSV4_WEIGHTS", "packed")
    text = PROMPTS[2]
    want, here = Engine(loaded("exact", "cpu"), 2048, 2).score(text), model.precision.value
    got = divergence(Engine(model, 2048, 2).score(text), want)
    if model.precision is Precision.EXACT:
        assert got < 1e-6  # fp32 sums in another order
    else:  # the same kinds of roundings, of other values
        assert got < 1.5 * divergence(Engine(loaded(here, "cpu"), 2048, 2).score(text), want)


@torch.inference_mode()
def test_captured_steps_equal_eager_ones(model):
    eager, captured = begun(model), begun(model)
    ids = torch.tensor([prompt[-1] for prompt in PROMPTS], device="cuda")
    graph = None
    for _ in range(12):
        engine, sequences = eager
        want = engine.logits(engine.forward([(s, [t]) for s, t in zip(sequences, ids.tolist())]))
        engine, sequences = captured
        batch = [(sequence, 1) for sequence in sequences]
        if graph is None:  # the eager step has compiled all kernels; a capture runs none
            plan, fed = engine.plan(batch, static=True), ids.clone()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = engine.logits(model(fed, plan, engine.caches))
        else:
            assert engine.plan(batch, out=plan) is plan
            fed.copy_(ids)
        graph.replay()
        assert torch.equal(got, want)
        ids = want.argmax(-1)


@torch.inference_mode()
def test_a_decode_step_waits_for_nothing(model):
    engine, sequences = begun(model)
    plan = engine.plan([(sequence, 1) for sequence in sequences], static=True)
    fed = engine.ids([prompt[-1] for prompt in PROMPTS])
    engine.logits(model(fed, plan, engine.caches))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.logits(model(fed, plan, engine.caches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
