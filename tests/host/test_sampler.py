"""Greedy batches of the host's sampler: the operator gives what the host gives, and only they go
through it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.logprob_processor import OutputLogprobProcessor
from sglang.srt.layers.sampler import Sampler

from dsv4_plugin.host import sampler as ours
from dsv4_plugin.ops.operator import HERE, OPERATORS

ROWS, VOCAB = 5, 97
WRITTEN = (
    "next_token_logprobs",
    "next_token_top_logprobs_val",
    "next_token_top_logprobs_idx",
    "next_token_token_ids_logprobs_val",
    "next_token_token_ids_logprobs_idx",
)


@pytest.fixture
def sampler():
    """The host's sampler without the process group that its constructor looks for."""
    made = Sampler.__new__(Sampler)
    torch.nn.Module.__init__(made)
    made.output_logprob_processor = OutputLogprobProcessor()
    return made


def info(**changed):
    given = {
        "is_all_greedy": True,
        "has_custom_logit_processor": False,
        "sampling_mask_batch_indices": None,
        "sampling_support_logprobs_capture_indices": None,
        "grammars": None,
    }
    return SimpleNamespace(**given | changed)


def sample(forward, sampler, logits, return_logprob=False, **changed):
    """(tokens, the log-probabilities that were written) of a call on a copy of `logits`."""
    output = LogitsProcessorOutput(next_token_logits=logits.clone())
    top, ids = [0, 3, 1, 2, 0], [None, [1, 5], None, [0], None]
    tokens = forward(
        sampler, output, info(**changed), return_logprob, top, ids, torch.arange(len(logits))
    )
    return tokens, {name: getattr(output, name) for name in WRITTEN}


def batches():
    torch.manual_seed(3)
    random = torch.randn(ROWS, VOCAB) * 10
    ties = torch.randint(0, 2, (ROWS, VOCAB)).float()
    holes = random.clone()
    holes[:, ::2], holes[1] = float("-inf"), float("-inf")
    extreme = torch.randn(ROWS, VOCAB).sign() * 1e4
    return {
        "random": random,
        "bfloat16": random.bfloat16(),
        "ties": ties,
        "masked": holes,
        "±1e4": extreme,
        "equal": torch.zeros(ROWS, VOCAB),
    }


@pytest.mark.parametrize("return_logprob", [False, True])
@pytest.mark.parametrize("name", batches())
def test_tokens_and_log_probabilities_are_those_of_the_host(sampler, name, return_logprob):
    logits = batches()[name]
    want, want_written = sample(ours.host_forward, sampler, logits, return_logprob)
    got, written = sample(ours.forward, sampler, logits, return_logprob)
    assert got.dtype == want.dtype and torch.equal(got, want)
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    assert torch.equal(got, first), "the lowest id among equals"
    for field, value in want_written.items():
        assert (value is None) == (not return_logprob or written[field] is None)
        torch.testing.assert_close(written[field], value, rtol=0, atol=0, equal_nan=True)


def test_nan_logits_are_cleaned_as_the_host_does(sampler, monkeypatch):
    monkeypatch.setenv("SGLANG_SANITIZE_NAN_LOGITS", "1")
    logits = torch.randn(ROWS, VOCAB)
    logits[2, :50] = float("nan")
    tokens = [sample(each, sampler, logits)[0] for each in (ours.host_forward, ours.forward)]
    assert torch.equal(*tokens) and tokens[0][2] >= 50


@pytest.mark.parametrize(
    "changed", [{"is_all_greedy": False}, {"sampling_mask_batch_indices": torch.arange(2)}]
)
def test_what_is_not_plain_greedy_is_the_hosts(sampler, monkeypatch, changed):
    monkeypatch.setattr(ours, "host_forward", lambda *args, **kwargs: "the host's")
    assert sample(ours.forward, sampler, torch.zeros(2, VOCAB), **changed)[0] == "the host's"
    assert sample(ours.forward, sampler, torch.zeros(0, VOCAB))[0] == "the host's"


def test_the_operator_makes_the_choice(sampler, monkeypatch):
    operator = OPERATORS["sample_greedy"]
    operator.configure()
    monkeypatch.setattr(HERE, "layer", -1)
    sample(ours.forward, sampler, torch.randn(ROWS, VOCAB))
    [row] = operator.rows()
    assert (row.implementation, row.calls) == ("reference", 1)
    operator.forget()


def test_hooks_of_others_stay_under_ours(monkeypatch):
    """Another plugin's wrapper of the host's method is what ours hands other batches to."""

    def hooked(*args, **kwargs):
        return "another plugin's"

    monkeypatch.setattr(Sampler, "forward", hooked)
    monkeypatch.setattr(ours, "host_forward", None)
    ours.SAMPLER.take(ours.SAMPLER.value)
    assert ours.SAMPLER.holds() and ours.host_forward is hooked
