"""The server in its default precision: as close to the exact answers as rounding allows, and equal
to our own engine."""

from __future__ import annotations

import re
import urllib.error

import pytest
import torch
from live_server import input_logprobs, output_ids, serving

from dsv4_plugin.config import Precision
from dsv4_plugin.roofline.layout import Layout
from dsv4_plugin.roofline.memory_plan import memory_plan

# bf16 activations, an FP8 cache and a rounded indexer cost 0.13 mean on this set of random weights
# (its README); the mistakes that this would hide are caught in exact precision.
GOLDEN_MEAN = 0.20
ENGINE_MEAN = 1e-3
"""Same operators on the same bytes; only the number of rows in a matrix product may differ."""


@pytest.fixture(scope="module")
def server(golden_dir, tmp_path_factory):
    """Requests come in at two processes of their own, which load no plugin by themselves."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(golden_dir, log, "--tokenizer-worker-num", "2") as running:
        yield running


@pytest.fixture(scope="module")
def scored(server, golden_sequences):
    return [
        torch.tensor(input_logprobs(server.generate(ids)), dtype=torch.float64)
        for ids, _, _ in golden_sequences
    ]


def test_rounding_costs_no_more_than_its_figure(scored, golden_sequences):
    errors = []
    for found, (ids, positions, logprobs) in zip(scored, golden_sequences):
        rows = (positions + 1 < len(ids)).nonzero().squeeze(-1)
        expected = logprobs[rows, torch.tensor(ids)[positions[rows] + 1]]
        errors.append((found[positions[rows]] - expected).abs())
    assert torch.cat(errors).mean() < GOLDEN_MEAN


def test_server_and_engine_agree(scored, golden_sequences, golden_dir, golden_geometry):
    from dsv4_plugin.checkpoint.load import load_checkpoint
    from dsv4_plugin.model import DeepseekV4
    from dsv4_plugin.runtime.engine import Engine

    model = DeepseekV4(golden_geometry, Precision.SERVING)
    load_checkpoint(model, golden_dir)
    engine = Engine(model)
    for found, (ids, _, _) in zip(scored, golden_sequences):
        logprobs = torch.log_softmax(engine.score(ids).double(), -1)
        ours = logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        assert (found - ours).abs().mean() < ENGINE_MEAN


def test_what_ends_a_scheduler_is_refused_by_every_tokenizer_worker(server, golden_geometry):
    for _ in range(20):  # the kernel hands each connection to one of the two
        for ids, named in (
            ([5, golden_geometry.vocab_size], f"token id {golden_geometry.vocab_size} is outside"),
            ([], "holds no prompt"),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                server.generate(ids)
            assert refused.value.code == 400 and named in refused.value.read().decode()
    assert len(output_ids(server.generate([5, golden_geometry.vocab_size - 1], 3))) == 3


def test_sampling_at_a_temperature_is_served(server):
    reply = server.request(
        "/generate",
        {
            "input_ids": [5, 6, 7],
            "sampling_params": {
                "temperature": 0.7,
                "top_p": 0.9,
                "max_new_tokens": 4,
                "ignore_eos": True,
            },
        },
    )
    assert reply["meta_info"]["completion_tokens"] == 4


def test_the_memory_plan_counts_as_the_host_does(server, golden_geometry):
    """A token's bytes in the pool, as the host prints them before it makes the pool."""
    plan = memory_plan(golden_geometry, Layout(1), memory=1e9)
    [printed] = set(re.findall(r"bytes_per_full_token=([\d.]+)", server.log.read_text()))
    assert float(printed) == pytest.approx(plan.token, abs=0.005)
