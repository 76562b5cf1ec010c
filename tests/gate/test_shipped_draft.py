"""The trained DSpark draft that lies beside the trained checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsv4_plugin.accuracy import gate
from dsv4_plugin.accuracy.recall import fact, held_out, question
from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.runtime import Engine
from dsv4_plugin.runtime.speculate import DSparkDraft

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
DRAFTING = gate.draft_directory(TINY)


def test_its_backbone_is_that_of_the_checkpoint_beside():
    with_block, with_draft = (
        load_file(directory / "model.safetensors") for directory in (TINY, DRAFTING)
    )
    kept = {name for name in with_block if not name.startswith("mtp.")}
    assert kept == {name for name in with_draft if not name.startswith("mtp.")}
    for name in kept:
        mine, theirs = with_block[name], with_draft[name]
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), name
    assert held_out(DRAFTING) == held_out(TINY)


def test_greedy_tokens_are_those_without_it_in_half_of_the_steps():
    """Of unseen text, and of answers about facts."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(DRAFTING / "tokenizer.json"))
    ids = tokenizer.encode(held_out(DRAFTING)[:12_000], add_special_tokens=False).ids
    prompts = [ids[400 * n : 400 * n + 150] for n in range(6)]
    asked = f"{fact('Alma', 'chess')} {held_out(DRAFTING)[:600]}\n{question('Alma')}"
    turn = f"<｜User｜>{asked}<｜Assistant｜></think>"
    prompts.append(tokenizer.encode(turn, add_special_tokens=False).ids)
    model = DeepseekV4(Geometry.from_dir(DRAFTING), Precision.EXACT)
    load_checkpoint(model, DRAFTING)
    engine = Engine(model, verify_rows=model.geometry.dspark.block_size + 1)
    plain = engine.generate(prompts, 48)
    found = engine.speculate(prompts, 48, DSparkDraft(engine))
    assert [each.tokens for each in found] == plain
    accepted = [count for each in found for count in each.accepted]
    # Its card says 2.14; another CPU's order of sums may tip single drafts.
    assert 1 + sum(accepted) / len(accepted) >= 2.0
