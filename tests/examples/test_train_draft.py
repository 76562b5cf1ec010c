"""The draft in training proposes what the draft in the engine proposes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.runtime import Engine

pytest.importorskip("tokenizers")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_tiny"))

import train_draft  # noqa: E402


@pytest.fixture(scope="module")
def models(dspark_dir):
    """(one that learns, one that serves), of the same weights."""
    pair = []
    for _ in range(2):
        model = DeepseekV4(Geometry.from_dir(dspark_dir), Precision.OFFICIAL)
        load_checkpoint(model, dspark_dir)
        pair.append(model)
    train_draft.learn_from_blocks(pair[0])
    return pair


@pytest.mark.parametrize("at", [3, 128, 200])
def test_what_learns_is_what_is_served(models, at):
    learner, served = models
    chance = torch.Generator().manual_seed(at)
    tokens = torch.randint(3, 300, (2, 256), generator=chance)
    width = served.geometry.hidden_size * len(served.geometry.dspark.target_layer_ids)
    taps = torch.randn(2, 256, width, generator=chance)
    with torch.inference_mode():
        row, places = torch.tensor([1, 0, 1]), torch.tensor([at, 77, 9])
        logits, sure = train_draft.propose(learner, taps, tokens, row, places)
        engine = Engine(served, max_tokens=512, max_requests=1, verify_rows=6)
        sequence = engine.open()
        plan = engine.plan([(sequence, at)])
        served.mtp.write_context(taps[1, :at], plan.position, plan.window_write, engine.caches)
        engine.reserve([sequence], 6)
        text = iter(tokens[1, at + 1 :])
        anchors = tokens[1, at : at + 1]
        ids = served.mtp.block(anchors)
        hidden = served.mtp(
            ids, served.embedded(ids), engine.draft_plan([sequence], 5), engine.caches
        )
        wanted = served.mtp.propose(hidden, anchors, served.logits, lambda _: next(text).view(1))
    # A latent on the border of two FP8 values may round either way.
    assert (logits[0] - wanted.logits[0]).abs().mean() < 2e-3
    assert (sure[0].sigmoid() - wanted.confidence[0]).abs().max() < 1e-2


def test_gradients_reach_every_part_of_the_draft(models):
    learner, _ = models
    tokens = torch.randint(3, 300, (1, 256), generator=torch.Generator().manual_seed(1))
    trained = {
        name: parameter.requires_grad_()
        for name, parameter in learner.named_parameters()
        if name.startswith("mtp.") and not name.endswith("gate.bias")
    }
    random = train_draft.random.Random(0)
    found = train_draft.losses(learner, tokens, random)
    found["loss"].backward()
    still = {name for name, parameter in trained.items() if not parameter.grad.any()}
    assert still == set() and all(parameter.grad.isfinite().all() for parameter in trained.values())
    assert not any(
        parameter.grad is not None
        for name, parameter in learner.named_parameters()
        if not name.startswith("mtp.")
    )
