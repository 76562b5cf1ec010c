"""A request's output does not depend on what else is in the batch, on the chunks, nor on the order
of pages."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_plugin.cache.step_plan import StepPlan
from dsv4_plugin.runtime import Engine
from dsv4_plugin.runtime import engine as engine_module

from .rows_alike import RowsAlike

TOLERANCE = 1e-5  # as in test_chunks
LONGEST = 280
COMMON = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def schedules(draw) -> list[list[tuple[int, int]]]:
    """Steps of (request, new tokens): requests come, get chunks or single tokens in any order, and
    end."""
    lengths = draw(
        st.lists(
            st.one_of(st.sampled_from([1, 4, 127, 128, 129, 256, 257]), st.integers(1, LONGEST)),
            min_size=2,
            max_size=4,
        )
    )
    left = dict(enumerate(lengths))
    steps = []
    while left:
        members = draw(st.permutations(sorted(left)))[: draw(st.integers(1, len(left)))]
        step = []
        for request in members:
            size = draw(st.sampled_from([1, 3, 64, 128, 200, 1000]))
            count = min(size, left[request])
            step.append((request, count))
            left[request] -= count
            if not left[request]:
                del left[request]
        steps.append(step)
    return steps


def prompt(request: int, length: int) -> list[int]:
    return torch.randint(
        2, 320, (LONGEST,), generator=torch.Generator().manual_seed(request)
    ).tolist()[:length]


@pytest.fixture(scope="module")
def distance(small_model):
    """Largest distance of results from each request on its own, in one chunk, longer than it is
    (see test_chunks)."""

    @functools.cache
    def alone(precision: str, request: int) -> torch.Tensor:
        with RowsAlike():
            return Engine(small_model(precision), 512, 1).score(prompt(request, LONGEST))

    return lambda precision, results: max(
        (got - alone(precision, request)[: len(got)])
        .abs()
        .nan_to_num(nan=float("inf"))
        .max()
        .item()
        for request, got in results.items()
        if len(got)
    )


def run(engine, steps) -> dict[int, torch.Tensor]:
    """Logits of every request after all steps; finished ones are closed, so that others get their
    pages and rows."""
    totals: dict[int, int] = {}
    for request, count in (part for step in steps for part in step):
        totals[request] = totals.get(request, 0) + count
    prompts = {request: prompt(request, total) for request, total in totals.items()}
    running, parts = {}, {request: [] for request in totals}
    for step in steps:
        batch = []
        for request, count in step:
            if request not in running:
                running[request] = engine.open()
            sequence = running[request]
            batch.append((sequence, prompts[request][sequence.length : sequence.length + count]))
        logits = engine.logits(engine.forward(batch)).split([count for _, count in step])
        for (request, _), part in zip(step, logits):
            parts[request].append(part)
            if running[request].length == totals[request]:
                engine.close(running[request])
    return {request: torch.cat(part) for request, part in parts.items()}


@settings(COMMON, max_examples=12)
@given(schedules(), st.integers(0, 2**16))
def test_any_batch(small_engine, distance, steps, page_seed):
    with RowsAlike():
        assert distance("exact", run(small_engine("exact", page_seed), steps)) <= TOLERANCE


STEPS = [
    [(0, 130), (1, 3)],
    [(1, 1), (2, 200), (0, 1)],
    [(0, 1), (1, 1), (2, 1)],
    [(2, 60)],
    [(1, 124), (3, 5)],
    [(3, 1), (0, 129), (1, 4)],
    [(3, 1)],
]


@pytest.mark.parametrize("precision", ["exact", "official", "serving"])
@pytest.mark.parametrize("page_seed", [None, 1])
def test_one_ragged_batch_in_every_precision(
    small_engine, distance, rows_alike, precision, page_seed
):
    assert distance(precision, run(small_engine(precision, page_seed), STEPS)) <= TOLERANCE


def test_order_of_requests_changes_nothing(small_engine, rows_alike):
    forward, backward = (
        run(small_engine("serving"), steps) for steps in (STEPS, [step[::-1] for step in STEPS])
    )
    for request in forward:
        assert torch.equal(forward[request], backward[request])


def test_pages_and_rows_of_finished_requests_are_reused_uncleared(
    small_engine, distance, rows_alike
):
    engine = small_engine("exact", page_seed=6)
    for other in range(50, 53):
        engine.score(prompt(other, 270))
    assert distance("exact", run(engine, STEPS)) <= TOLERANCE


def test_requests_without_new_tokens_are_legal(small_engine, distance, rows_alike):
    steps = [
        [(0, 0), (1, 0)],
        [(0, 130), (1, 0)],
        [(0, 0), (1, 4)],
        [(1, 1), (0, 3), (2, 0)],
        [(2, 0)],
        [(2, 2)],
    ]
    engine = small_engine("exact")
    sequences, parts = (
        {request: engine.open() for request in range(3)},
        {request: [] for request in range(3)},
    )
    for step in steps:
        batch = [
            (sequences[r], prompt(r, LONGEST)[sequences[r].length :][:count]) for r, count in step
        ]
        for (r, _), part in zip(
            step, engine.logits(engine.forward(batch)).split([count for _, count in step])
        ):
            parts[r].append(part)
    assert distance("exact", {r: torch.cat(part) for r, part in parts.items()}) <= TOLERANCE
    assert engine.logits(engine.forward([])).shape == (0, 320)


@pytest.mark.parametrize("field", ["window", "request_slots", "dense_slots"])
def test_looking_into_a_neighbours_pages_shows(
    small_engine, distance, rows_alike, monkeypatch, field
):
    """The property bites: slots of the next request in the batch change the output."""
    run_plan = engine_module.build_step_plan

    def mistaken(*args, **kwargs):
        plan = run_plan(*args, **kwargs)
        if field == "window":
            plan.window.copy_(plan.window.roll(1, 0).where(plan.window >= 0, plan.window))
        elif field == "dense_slots":
            plan.dense_slots.copy_(plan.dense_slots.roll(1, 0))
        return plan

    monkeypatch.setattr(engine_module, "build_step_plan", mistaken)
    if field == "request_slots":
        slots = StepPlan.request_slots
        monkeypatch.setattr(StepPlan, field, lambda plan, ratio: slots(plan, ratio).roll(1, 0))
    results = run(small_engine("exact"), STEPS)
    monkeypatch.undo()
    assert distance("exact", results) > 1000 * TOLERANCE
