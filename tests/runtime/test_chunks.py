"""Prefill in any chunks, decode and continued prefixes give what one chunk gives, in every
precision.

Under `rows_alike` equal means equal: 1e-5 of logits near 2 allows for a float64 sum at a border of
fp32 rounding.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module

import pytest
import torch

from dsv4_plugin.config import Precision
from dsv4_plugin.model import attention
from dsv4_plugin.runtime import Engine
from dsv4_plugin.runtime import engine as engine_module
from dsv4_plugin.runtime.engine import Sequence

from .rows_alike import RowsAlike

STEP_PLAN = import_module("dsv4_plugin.ops.step_plan")
TOLERANCE = 1e-5
LENGTH = 300
CHUNKS = {
    "decode": [1] * 40,
    "decode over a window border": [120, *[1] * 20],
    "decode over a page border": [245, *[1] * 20],
    "irregular": [3, 1, 124, 1, 7, 113, 5, 1, 2, 43],
    "window borders": [127, 1, 1, 126, 1, 1, 43],
    "page borders": [255, 1, 1, 43],
    "pages": [256, 44],
    "inside windows": [130, 2, 122, 46],
    "threes": [3] * 45,
}
# for the precisions that differ only in stores
ROUNDED = ("decode over a page border", "irregular", "window borders")
CASES = [("exact", chunks) for chunks in CHUNKS] + [
    (p, chunks) for p in ("official", "serving") for chunks in ROUNDED
]
BORDERS = (1, 2, 3, 4, 5, 127, 128, 129, 255, 256, 257, 260)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return torch.randint(2, 320, (LENGTH,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(scope="module")
def whole(small_model, prompt):
    """Logits of the prompt in one chunk, by precision."""
    cache: dict[str, torch.Tensor] = {}

    def of(precision: str) -> torch.Tensor:
        if precision not in cache:
            with RowsAlike():
                cache[precision] = Engine(small_model(precision)).score(prompt)
        return cache[precision]

    return of


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference; infinite where a row that nobody wrote was read, for rings start as
    NaN."""
    return (got - want).abs().nan_to_num(nan=float("inf")).max().item()


@pytest.mark.parametrize("precision, chunks", CASES)
def test_chunks(small_engine, prompt, whole, rows_alike, precision, chunks):
    tokens = prompt[: sum(CHUNKS[chunks])]
    got = small_engine(precision, page_seed=1).score(tokens, CHUNKS[chunks])
    assert distance(got, whole(precision)[: len(tokens)]) <= TOLERANCE


def ragged(engine: Engine, prompts: list[list[int]]) -> tuple[list[Sequence], list[torch.Tensor]]:
    """The prompts in one step: their sequences and logits."""
    sequences = [engine.open() for _ in prompts]
    logits = engine.logits(engine.forward(list(zip(sequences, prompts))))
    return sequences, list(logits.split([len(prompt) for prompt in prompts]))


def test_prompts_of_all_border_lengths_then_decode(small_engine, prompt, whole, rows_alike):
    """What follows a prompt changes none of its logits, and each decodes on as the long one goes
    on."""
    engine = small_engine("exact", page_seed=4)
    sequences, logits = ragged(engine, [prompt[:n] for n in BORDERS])
    for n, got in zip(BORDERS, logits):
        assert distance(got, whole("exact")[:n]) <= TOLERANCE, n
    for step in range(6):
        got = engine.logits(
            engine.forward([(s, [prompt[n + step]]) for s, n in zip(sequences, BORDERS)])
        )
        want = whole("exact")[[n + step for n in BORDERS]]
        distances = (got - want).abs().amax(-1).tolist()
        assert max(distances) <= TOLERANCE, (step, dict(zip(BORDERS, distances)))


def test_a_chunk_after_prefixes_of_all_border_lengths(small_engine, prompt, whole, rows_alike):
    engine = small_engine("exact", page_seed=5)
    sequences, _ = ragged(engine, [prompt[:n] for n in BORDERS])
    counts = [min(37, LENGTH - n) for n in BORDERS]
    got = engine.logits(
        engine.forward([(s, prompt[n : n + c]) for s, n, c in zip(sequences, BORDERS, counts)])
    ).split(counts)
    for n, count, part in zip(BORDERS, counts, got):
        assert distance(part, whole("exact")[n : n + count]) <= TOLERANCE, n


def share(engine: Engine, sequence: Sequence, pages: int) -> Sequence:
    """A sequence that starts with pages of another, as a prefix cache hands them out."""
    tokens = pages * 256
    other = engine.open()
    engine._slots[other.row, :tokens] = engine._slots[sequence.row, :tokens]
    other.pages, other.window_pages, other.length = (
        sequence.pages[:pages],
        sequence.window_pages[:pages],
        tokens,
    )
    return other


def after_a_shared_prefix(small_engine, precision: str, chunks: list[int]) -> float:
    """Distance of a continuation on shared pages from the same prompt on pages of its own."""
    random = torch.Generator().manual_seed(1)
    prefix, mine, other = (
        torch.randint(2, 320, (n,), generator=random).tolist() for n in (256, 30, 20)
    )
    want = small_engine(precision).score(prefix + mine)[256:]
    engine = small_engine(precision, page_seed=2)
    owner = engine.open()
    engine.forward([(owner, prefix[:200])])
    # the owner goes on past the page before the other takes it up
    engine.forward([(owner, prefix[200:] + other)])
    sequence, parts, start = share(engine, owner, 1), [], 0
    for size in chunks:
        parts.append(engine.logits(engine.forward([(sequence, mine[start : start + size])])))
        start += size
    return distance(torch.cat(parts), want[:start])


@pytest.mark.parametrize("precision", [precision.value for precision in Precision])
@pytest.mark.parametrize("chunks", [[30], [2, *[1] * 7, 5, 16]], ids=len)
def test_shared_prefix(small_engine, rows_alike, precision, chunks):
    assert after_a_shared_prefix(small_engine, precision, chunks) <= TOLERANCE


@pytest.mark.parametrize(
    "chunks", [[1] * 129, [50, 79], [127, 2], [5, 1, 122, 1]], ids=lambda chunks: str(len(chunks))
)
def test_golden_sequence_in_plain_arithmetic(golden, golden_model, chunks):
    tokens = golden["input_ids_2"].tolist()
    got = Engine(golden_model("exact")).score(tokens, chunks)
    # Nothing flips on these ids (README); other GEMM shapes give other fp32 sums: 2.8e-5 between
    # two implementations.
    assert distance(got, golden["logits_2"]) <= 1e-4


MISTAKE = 1000 * TOLERANCE


def test_ring_written_before_it_is_read_shows(small_engine, prompt, whole, rows_alike, monkeypatch):
    run = attention.compress.reference

    def ring_first(projected, ring, rows, *args):
        kept = rows.ring_write_row >= 0
        ring[rows.ring_write_row[kept]] = projected[kept]
        run(projected, ring, rows, *args)

    want = whole("exact")
    monkeypatch.setattr(attention, "compress", ring_first)
    # A chunk that begins inside a window and ends in a later one overwrites the rows that the first
    # one needs.
    assert distance(small_engine("exact").score(prompt, [130, 9, 161]), want) > MISTAKE


def kept_by(rule):
    """The rule for ring rows replaced by one of (position, length after the step, ratio)."""
    return lambda steps, ratio: rule(steps.position, steps.seq_lens[steps.request], ratio)


def test_page_ends_not_kept_shows(small_engine, rows_alike, monkeypatch):
    """The rows of positions 252..255 make a page complete for whoever continues after it."""
    monkeypatch.setattr(
        STEP_PLAN._Steps,
        "_kept",
        kept_by(lambda p, after, ratio: p >= after // ratio * ratio - (4 if ratio == 4 else 0)),
    )
    assert after_a_shared_prefix(small_engine, "exact", [30]) > MISTAKE


def test_window_before_not_kept_shows(small_engine, prompt, whole, rows_alike, monkeypatch):
    want = whole("exact")[:140]
    monkeypatch.setattr(
        STEP_PLAN._Steps, "_kept", kept_by(lambda p, after, ratio: p >= after // ratio * ratio)
    )
    assert distance(small_engine("exact").score(prompt[:140], [130, 10]), want) > MISTAKE


def test_chunk_end_visible_to_all_its_rows_shows(
    small_engine, prompt, whole, rows_alike, monkeypatch
):
    want = whole("exact")
    monkeypatch.setattr(
        engine_module.StepPlan,
        "visible",
        lambda plan, ratio: ((plan.position + 1) // ratio).amax().expand_as(plan.position),
    )
    assert distance(small_engine("exact").score(prompt), want) > MISTAKE


@pytest.mark.parametrize("field", ["step_row", "ring_row"])
def test_window_shifted_by_one_shows(small_engine, prompt, whole, rows_alike, monkeypatch, field):
    want = whole("exact")
    run = engine_module.build_step_plan

    def shifted(*args, **kwargs):
        plan = run(*args, **kwargs)
        part = plan.compression[4]
        rows = getattr(part, field)
        part = dataclasses.replace(part, **{field: torch.where(rows > 0, rows - 1, rows)})
        return dataclasses.replace(plan, compression={**plan.compression, 4: part})

    monkeypatch.setattr(engine_module, "build_step_plan", shifted)
    got = small_engine("exact").score(prompt, [130, 170])
    assert distance(got, want) > MISTAKE


def test_a_layer_waits_before_it_touches_its_stores(small_engine, prompt, whole, rows_alike):
    """Pages that come from another memory, a layer at a time, hold garbage until they are there."""
    engine = small_engine("serving", page_seed=6)
    [sequence], _ = ragged(engine, [prompt[:260]])
    caches, coming = engine.caches, {}
    for layer in caches.window:
        stores = (caches.window, caches.compressed, caches.index)
        parts = [part[layer].pages for part in stores if layer in part]
        parts += [part[layer] for part in (caches.ring, caches.index_ring) if layer in part]
        coming[layer] = [(part, part.clone()) for part in parts]
        for part in parts:
            part.view(torch.uint8).fill_(255)  # NaN in FP8, bf16 and fp32

    def wait(layer: int) -> None:
        for part, content in coming.pop(layer):
            part.copy_(content)

    caches.wait = wait
    got = engine.logits(engine.forward([(sequence, prompt[260:])]))
    assert not coming
    assert distance(got, whole("serving")[260:]) <= TOLERANCE
