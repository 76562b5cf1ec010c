"""Decode steps on a strict tape, a CPU's stand-in for a captured graph: equal to eager ones bit for
bit, by our engine and by the host's own graph runner."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tape import Forbidden, Tape

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.ops import build_step_plan
from dsv4_plugin.runtime import Engine

TRAINED = Path(__file__).parents[2] / "checkpoints" / "tiny"
LENGTHS = (7, 130, 300)
"""From there on 24 tokens close windows of 4 and of 128 tokens, cross a page, and the last selects
64 of its entries."""
_random = random.Random(5)
PROMPTS = [[_random.randrange(4, 2000) for _ in range(length)] for length in LENGTHS]


# -- the tape itself


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.to(torch.int64).abs().bincount(),
        lambda x: x.numpy(),
        lambda x: torch.tensor([1.0, 2.0]) + x.sum(),
    ],
)
def test_what_a_capturing_stream_refuses(waits):
    with pytest.raises(Forbidden), Tape():
        waits(torch.randn(4))


def test_a_replay_runs_on_the_same_memory():
    x, kept, backwards = torch.arange(4.0), torch.zeros(4), torch.tensor([3, 2, 1, 0])
    with Tape() as tape:
        doubled = x * 2
        kept[backwards] = doubled
    address = doubled.data_ptr()
    x.copy_(torch.tensor([5.0, 6.0, 7.0, 8.0]))
    tape.replay()
    assert doubled.tolist() == [10, 12, 14, 16] and doubled.data_ptr() == address
    assert kept.tolist() == [16, 14, 12, 10]


# -- our engine


@pytest.fixture(scope="module", params=["exact", "official", "serving"])
def model(request):
    model = DeepseekV4(Geometry.from_dir(TRAINED), Precision(request.param), parts="backbone")
    load_checkpoint(model, TRAINED)
    return model


def begun(model) -> tuple[Engine, list]:
    """An engine and sequences that hold all prompts but for the last token."""
    engine = Engine(model, max_tokens=2048, max_requests=4)
    sequences = [engine.open() for _ in PROMPTS]
    for sequence, prompt in zip(sequences, PROMPTS):
        engine.forward([(sequence, prompt[:-1])])
    return engine, sequences


@torch.inference_mode()
def test_a_replayed_step_equals_an_eager_one(model):
    """The plan is refreshed in place, nothing else of a replay is Python's."""
    eager, captured = begun(model), begun(model)
    ids = torch.tensor([prompt[-1] for prompt in PROMPTS])
    tape = plan = None
    for _ in range(12):
        engine, sequences = eager
        want = engine.logits(engine.forward([(s, [t]) for s, t in zip(sequences, ids.tolist())]))
        engine, sequences = captured
        batch = [(sequence, 1) for sequence in sequences]
        if tape is None:
            plan, fed = engine.plan(batch, static=True), ids.clone()
            with Tape() as tape:
                got = engine.logits(model(fed, plan, engine.caches))
        else:
            assert engine.plan(batch, out=plan) is plan
            fed.copy_(ids)
            tape.replay()
        assert torch.equal(got, want)
        ids = want.argmax(-1)


@torch.inference_mode()
def test_a_plan_that_is_not_refreshed_shows(model):
    engine, sequences = begun(model)
    plan = engine.plan([(sequence, 1) for sequence in sequences], static=True)
    fed = torch.tensor([prompt[-1] for prompt in PROMPTS])
    with Tape() as tape:
        got = engine.logits(model(fed, plan, engine.caches))
    first = got.clone()
    tape.replay()
    assert torch.equal(got, first)
    engine.plan([(sequence, 1) for sequence in sequences], out=plan)
    tape.replay()
    assert not torch.equal(got, first)


def operations(model, prompts) -> dict[str, int]:
    """Of a captured step after `prompts`, by part of the model; views, which launch nothing, are
    left out."""
    engine = Engine(model, max_tokens=2048, max_requests=4)
    sequences = [engine.open() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts):
        engine.forward([(sequence, prompt[:-1])])
    plan = engine.plan([(sequence, 1) for sequence in sequences], static=True)
    fed = torch.tensor([prompt[-1] for prompt in prompts])
    tape, begun_at, counted = Tape(), {}, {}

    def work(begin: int = 0) -> int:
        return sum(not operation.is_view for operation, *_ in tape.calls[begin:])

    def begin(part, _):
        begun_at[part] = len(tape.calls)

    def end(part, *_):
        counted[names[part]] = work(begun_at[part])

    names = {layer.attn: f"attention, ratio {layer.ratio}" for layer in model.layers}
    names |= {layer.ffn: f"experts, layer {layer.layer}" for layer in model.layers}
    hooks = [part.register_forward_pre_hook(begin) for part in names]
    hooks += [part.register_forward_hook(end) for part in names]
    with tape:
        engine.logits(model(fed, plan, engine.caches))
    for hook in hooks:
        hook.remove()
    return counted | {"the rest": work() - sum(counted.values())}


@torch.inference_mode()
def test_operations_of_the_parts_of_a_captured_step(model):
    """As many for any number of rows and any length; docs/host.md has them in `serving`."""
    one = operations(model, PROMPTS[-1:])
    assert operations(model, PROMPTS) == one
    # A loop over experts, rows or entries in one of them, a second pass in all would not fit.
    assert one["attention, ratio 0"] < 100
    assert one["attention, ratio 128"] < 200
    assert one["attention, ratio 4"] < 350
    assert all(one[f"experts, layer {layer}"] < 64 for layer in range(3))
    assert one["the rest"] < 700


@torch.inference_mode()
def test_a_prefill_cannot_be_captured(model):
    engine = Engine(model, max_tokens=1024, max_requests=1)
    sequence = engine.open()
    plan = engine.plan([(sequence, len(PROMPTS[1]))])
    with pytest.raises(Forbidden), Tape():
        model(torch.tensor(PROMPTS[1]), plan, engine.caches)


VERIFIED = 6
"""Rows of a request that a step verifies: the anchor and five drafts."""


@pytest.fixture(scope="module")
def drafting(dspark_dir):
    """An engine whose model has a DSpark draft, and sequences of the prompts' lengths."""
    model = DeepseekV4(Geometry.from_dir(dspark_dir), Precision.EXACT)
    load_checkpoint(model, dspark_dir)
    engine = Engine(model, max_tokens=2048, max_requests=4, verify_rows=VERIFIED)
    sequences = [engine.open() for _ in LENGTHS]
    engine.forward([(s, [*range(2, 2 + n)]) for s, n in zip(sequences, LENGTHS)])
    engine.reserve(sequences, 4 * VERIFIED)
    return engine, sequences


def verification(engine, sequences, out=None):
    """The static plan of a step that verifies, as the backend plans it for any length."""
    prefix = engine.ids([sequence.length for sequence in sequences])
    row = engine.ids([sequence.row for sequence in sequences])
    request = torch.arange(len(sequences)).repeat_interleave(VERIFIED)
    position = (prefix.unsqueeze(1) + torch.arange(VERIFIED)).flatten()
    return build_step_plan(
        position,
        request,
        engine._slots[row[request], position],
        prefix,
        prefix + VERIFIED,
        engine._slots,
        row,
        engine._full_to_window,
        VERIFIED,
        1024,
        rings=engine.rings,
        static_rows=True,
        may_shrink=True,
        out=out,
    )


@torch.inference_mode()
def test_a_verified_step_and_what_it_leaves_the_draft_can_be_captured(drafting):
    engine, sequences = drafting
    model, ids = engine.model, torch.arange(20, 20 + VERIFIED * len(sequences))
    plan = verification(engine, sequences)

    def step(plan):
        taps = []
        logits = model.logits(model.collapse(model(ids, plan, engine.caches, taps)))
        model.mtp.write_context(
            torch.cat(taps, -1), plan.position, plan.window_write, engine.caches
        )
        return logits

    with Tape() as tape:
        captured = step(plan)
    for sequence in sequences:  # some drafts stay, and the next step writes over the others
        sequence.length += 3
    assert verification(engine, sequences, out=plan) is plan
    tape.replay()
    assert torch.equal(captured, step(verification(engine, sequences)))


@torch.inference_mode()
def test_a_pass_of_the_draft_can_be_captured(drafting):
    engine, sequences = drafting
    stages = engine.model.mtp
    ids = stages.block(torch.tensor([5, 6, 7]))
    plan = replace(engine.draft_plan(sequences, stages.block_size), static=True)

    def drafted(plan):
        return stages(ids, engine.model.embedded(ids), plan, engine.caches)

    with Tape() as tape:
        captured = drafted(plan)
    for sequence in sequences:
        sequence.length -= 2
    now = engine.draft_plan(sequences, stages.block_size)
    for mine, theirs in zip(now.tensors(), plan.tensors(), strict=True):
        theirs.copy_(mine)
    tape.replay()
    assert torch.equal(captured, drafted(replace(now, static=True)))


# -- the host's scheduler and its graph runner


ARGUMENTS = (
    "--max-total-tokens 8192 --context-length 1024 --max-running-requests 4"
    " --swa-full-tokens-ratio 0.5"
).split()

SIZES = "--cuda-graph-bs-decode 1 2 3".split()


@pytest.fixture(scope="module")
def both(schedulers):
    """The same requests, which end one after the other, eagerly and on tapes."""
    return [
        schedulers.run(TRAINED, PROMPTS, *ARGUMENTS, *SIZES, new_tokens=[24, 14, 9], tape=tape)
        for tape in (False, True)
    ]


def test_captured_steps_of_the_host_equal_eager_ones(both):
    """Without padding, to the bit: a product of more rows may sum in another order. Rings start
    full of NaN."""
    eager, captured = both
    assert captured["tokens"] == eager["tokens"]
    assert captured["batches"] == eager["batches"] == [3] * 8 + [2] * 5 + [1] * 10
    assert captured["digests"] == eager["digests"]
    assert captured["replays"] == 23


def test_what_ran_counts_replays(both):
    eager, captured = both
    assert captured["moe_calls"] == eager["moe_calls"] == 3 * 23


def test_reads_of_shared_tables_end_before_the_replay(both):
    assert both[1]["read_done_in_graph"] == [False]


def test_operations_of_a_captured_step(both):
    """They are launches on a GPU whose operators are all references; three layers."""
    assert set(both[1]["operations"]) == {"1", "2", "3"}
    assert max(both[1]["operations"].values()) < 2600


def test_padded_steps_and_requests_taken_back(schedulers):
    """All steps replay a graph of 4 rows, which a retracted request leaves and enters again; in
    `exact`, where a second prefill rounds nothing."""
    run = functools.partial(
        schedulers.run, TRAINED, PROMPTS, *ARGUMENTS, new_tokens=[24] * 3, DSV4_PRECISION="exact"
    )
    eager = run()
    captured = run("--cuda-graph-bs-decode", "4", tape=True)
    retracted = run("--cuda-graph-bs-decode", "4", tape=True, retract_every=9)
    assert captured["tokens"] == retracted["tokens"] == eager["tokens"]
    # fp32 sums of a product with another number of rows
    np.testing.assert_allclose(captured["largest"], eager["largest"], rtol=0, atol=1e-4)
    assert eager["batches"] == captured["batches"] == [3] * 23
    assert retracted["batches"][:9] == [3] * 8 + [2]  # the third was taken back
