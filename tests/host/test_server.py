"""The exact server against the golden logits: chunked prefill, prefix hits, concurrency,
retraction, tensor parallelism."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from live_server import input_logprobs, output_ids, output_logprobs, serving

# Two fp32 implementations of the model differ by 2.4e-6 mean and 1.5e-5 at most on this set (its
# README); ten times that leaves room for other summation orders, and the smallest of the README's
# mistakes is 2.4e-2.
GOLDEN_MEAN = 3e-5
SAME_MAX = 2e-4
"""Largest difference of a log-probability between two exact runs that batch the same tokens
differently."""


@pytest.fixture(
    scope="module",
    params=[
        # A pool too small for what runs at once.
        pytest.param(
            (
                "--chunked-prefill-size",
                "256",
                "--max-total-tokens",
                "2048",
                "--swa-full-tokens-ratio",
                "1.0",
                "--schedule-conservativeness",
                "0.01",
            ),
            id="chunks-and-retraction",
        ),
        # Chunks mixed with decode rows, which start anywhere inside windows of 128 and 4 tokens.
        pytest.param(
            (
                "--tp",
                "2",
                "--disable-radix-cache",
                "--chunked-prefill-size",
                "256",
                "--enable-mixed-chunk",
            ),
            id="tp2-mixed-chunks-no-radix",
        ),
    ],
)
def server(request, golden_dir, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(golden_dir, log, *request.param, DSV4_PRECISION="exact") as running:
        running.small_pool = "--max-total-tokens" in request.param
        running.radix = "--disable-radix-cache" not in request.param
        yield running


def differences(one, other):
    assert len(one) == len(other) and len(one) > 0
    return (torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)).abs()


@pytest.fixture(scope="module")
def scored(server, golden_sequences):
    """Every golden sequence scored alone, from an empty cache."""
    server.flush()
    return [server.generate(ids) for ids, _, _ in golden_sequences]


def test_logprobs_equal_the_golden_set(scored, golden_sequences):
    for reply, (ids, positions, logprobs) in zip(scored, golden_sequences):
        found = input_logprobs(reply)
        rows = [row for row, position in enumerate(positions.tolist()) if position + 1 < len(ids)]
        expected = [logprobs[row, ids[int(positions[row]) + 1]].item() for row in rows]
        assert (
            differences([found[int(positions[row])] for row in rows], expected).mean() < GOLDEN_MEAN
        )
        assert output_ids(reply) == [int(logprobs[-1].argmax())]


def test_prefix_hit_changes_nothing(server, scored, golden_sequences):
    ids = golden_sequences[0][0]
    first = server.generate(ids, logprob_start=600)
    again = server.generate(ids, logprob_start=600)
    if server.radix:
        assert again["meta_info"]["cached_tokens"] == 512  # the largest multiple of 256 below 700
    for reply in (first, again):
        tail = input_logprobs(reply)
        assert differences(tail, input_logprobs(scored[0])[-len(tail) :]).max() < SAME_MAX


def test_requests_do_not_change_one_another(server, scored, golden_sequences):
    server.flush()
    jobs = [0, 1, 2, 2, 1, 0]
    with ThreadPoolExecutor(len(jobs)) as pool:
        replies = list(pool.map(lambda k: server.generate(golden_sequences[k][0]), jobs))
    for k, reply in zip(jobs, replies):
        assert differences(input_logprobs(reply), input_logprobs(scored[k])).max() < SAME_MAX


def test_decoding_equals_scoring(server, golden_sequences):
    """Three requests of two pages each decode together into a third page; the small pool has eight
    and retracts one."""
    ids = golden_sequences[0][0]
    prompts, count = [ids[start : start + 500] for start in (0, 100, 200)], 40
    server.flush()
    with ThreadPoolExecutor(3) as pool:
        replies = list(
            pool.map(lambda prompt: server.generate(prompt, count, logprob_start=-1), prompts)
        )
    for prompt, reply in zip(prompts, replies):
        again = server.generate(prompt + output_ids(reply), logprob_start=len(prompt) - 1)
        assert differences(output_logprobs(reply), input_logprobs(again)[-count:]).max() < SAME_MAX
    if server.small_pool:
        assert "Retract requests" in server.log.read_text()


def test_a_mixture_of_requests_decodes_what_it_would_alone(server, golden_sequences):
    """Shared prefixes of any length, odd tails, few and many new tokens, and a sampling request
    aborted while it runs."""
    chance = random.Random(3)
    shared = golden_sequences[0][0]

    def some_request():
        prompt = shared[: chance.randrange(1, 640)] + [
            chance.randrange(2, 512) for _ in range(chance.randrange(40))
        ]
        return prompt, chance.randrange(1, 24)

    requests = [some_request() for _ in range(12)]
    with ThreadPoolExecutor(6) as pool:
        gone = pool.submit(
            server.request,
            "/generate",
            {
                "rid": "gone",
                "input_ids": shared[:300],
                "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True},
            },
        )
        replies = pool.map(lambda request: server.generate(*request, logprob_start=-1), requests)
        time.sleep(1)
        server.request("/abort_request", {"rid": "gone"})
        replies = list(replies)
        assert gone.result()["meta_info"]["finish_reason"]["type"] == "abort"
    for (prompt, count), reply in zip(requests, replies):
        again = server.generate(prompt + output_ids(reply), logprob_start=max(len(prompt) - 1, 0))
        assert differences(output_logprobs(reply), input_logprobs(again)[-count:]).max() < SAME_MAX
