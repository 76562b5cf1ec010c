"""A checkpoint with a DSpark draft behind the stock server, without the draft and with it."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from guessing_draft import prompts, write_guessing
from live_server import ask_many, output_ids, output_logprobs, serving
from one_scheduler import Schedulers
from scipy.stats import chisquare

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.checkpoint.tiny_tokenizer import byte_id
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.ops.accept import probabilities
from dsv4_plugin.runtime import Engine
from dsv4_plugin.runtime.speculate import Continuation, DSparkDraft

TRAINED = Path(__file__).parents[2] / "checkpoints" / "tiny-dspark"
DSPARK = ("--speculative-algorithm", "DSPARK")
EXACT = {"DSV4_PRECISION": "exact"}
ROWS = 6
"""Of a verification: the anchor and five drafts."""
NEW_TOKENS = 24
TOLERANCE = 2e-5
"""Of a log-probability: two exact runs that batch the same tokens differently differ by 1e-5 of
logits near 2."""


def engine_of(directory, **options) -> Engine:
    torch.set_num_threads(1)  # fixtures of a module run before those of a test
    model = DeepseekV4(Geometry.from_dir(directory), Precision.EXACT)
    load_checkpoint(model, directory)
    return Engine(model, **options)


def test_served_without_the_draft_and_says_so(dspark_dir, tmp_path):
    (prompt,) = prompts()[1:2]
    (expected,) = engine_of(dspark_dir).generate([prompt], 12)
    with serving(dspark_dir, tmp_path / "log", **EXACT) as server:
        assert output_ids(server.generate(prompt, 12, logprob_start=-1)) == expected
    said = [line for line in server.log.read_text().splitlines() if "DSpark" in line]
    assert len(said) == 1 and "3 stages, 5 tokens a step) is not loaded" in said[0]


@pytest.fixture(scope="module")
def guessing_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("guessing") / "model"
    write_guessing(directory)
    return directory


@pytest.fixture(scope="module")
def engine(guessing_dir) -> Engine:
    return engine_of(guessing_dir, verify_rows=ROWS)


@pytest.fixture(scope="module")
def expected(engine) -> list[Continuation]:
    """Greedy continuations of the prompts without a draft, and what our own engine accepts."""
    plain = engine.generate(prompts(), NEW_TOKENS)
    drafted = [engine.speculate([p], NEW_TOKENS, DSparkDraft(engine))[0] for p in prompts()]
    assert [each.tokens for each in drafted] == plain
    return drafted


@pytest.fixture(scope="module")
def server(guessing_dir, tmp_path_factory):
    """In chunks of a page, so that two prompts take several."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--chunked-prefill-size", "256", "--enable-metrics", *DSPARK)
    with serving(guessing_dir, log, *options, tokenizer=True, **EXACT) as running:
        yield running


def steps(reply: dict) -> tuple[int, int]:
    """(verifications, drafted tokens that stayed) of a request, by the host's account."""
    told = reply["meta_info"]
    return told["spec_verify_ct"], told["spec_num_correct_drafts"]


def test_tokens_of_plain_decoding_in_the_steps_of_our_own_engine(server, expected):
    """Twice: the second time the prompts' pages are there, and the draft's windows with them."""
    replies = [server.generate(prompt, NEW_TOKENS, -1) for prompt in prompts()]
    again = [server.generate(prompt, NEW_TOKENS, -1) for prompt in prompts()]
    accepted = [each.accepted for each in expected]
    assert {0, 1, 2, 5} <= {count for counts in accepted for count in counts}
    for round_ in (replies, again):
        assert [output_ids(reply) for reply in round_] == [each.tokens for each in expected]
        assert [steps(reply) for reply in round_] == [(len(c), sum(c)) for c in accepted]
    cached = [reply["meta_info"]["cached_tokens"] for reply in again]
    assert cached == [
        (len(prompt) + 30) // 256 * 256 if len(prompt) > 256 else 0 for prompt in prompts()
    ]
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as reply:
        verified = re.search(r"spec_verify_calls_total{.*} (\S+)", reply.read().decode())
    assert float(verified[1]) >= 2 * sum(map(len, accepted))


def test_log_probabilities_of_accepted_tokens(server, engine, expected):
    for prompt, continuation in zip(prompts(), expected):
        reply = server.generate(prompt, NEW_TOKENS, -1)
        logits = engine.score([*prompt, *continuation.tokens])[len(prompt) - 1 : -1]
        of_tokens = torch.log_softmax(logits, -1).gather(
            1, torch.tensor(continuation.tokens).unsqueeze(1)
        )
        found = torch.tensor(output_logprobs(reply))
        assert (found - of_tokens.squeeze(1)).abs().max() <= TOLERANCE


def test_an_end_inside_an_accepted_run(server, expected):
    prompt, continuation = prompts()[-1], expected[-1]
    tokens, second = continuation.tokens, _inside_a_run(continuation)
    for options, length in (
        ({"stop_token_ids": [tokens[second]]}, tokens.index(tokens[second]) + 1),
        ({"max_new_tokens": second}, second),
    ):
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": False} | options
        body = {"input_ids": prompt, "return_logprob": True, "sampling_params": sampling}
        assert output_ids(server.request("/generate", body)) == tokens[:length], options


def _inside_a_run(continuation: Continuation) -> int:
    """Where the second token of the first run of at least two accepted ones stands."""
    start = 1
    for count in continuation.accepted:
        if count >= 2:
            return start + 1
        start += count + 1
    raise AssertionError("no run of two")


def test_a_stop_string_inside_an_accepted_run(server, expected):
    prompt, continuation = prompts()[-1], expected[-1]
    at = _inside_a_run(continuation)
    text = server.generate(prompt, NEW_TOKENS, -1)["text"]
    assert len(text) == NEW_TOKENS  # a token is a character
    stop = text[at : at + 2]
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "stop": [stop]}
    reply = server.request("/generate", {"input_ids": prompt, "sampling_params": sampling})
    assert reply["text"] == text[: text.index(stop)]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_a_grammar_masks_every_row_that_is_verified(server, engine):
    """Each token is the likeliest of those that the grammar lets through."""
    prompt, letters = prompts()[0], "abcdef"
    sampling = {"temperature": 0, "max_new_tokens": 20, "regex": f"[{letters}]{{12}}"}
    body = {"input_ids": prompt, "return_logprob": True, "sampling_params": sampling}
    reply = server.request("/generate", body)
    assert re.fullmatch(f"[{letters}]{{12}}", reply["text"])
    allowed = torch.tensor([byte_id(ord(letter)) for letter in letters])
    tokens = output_ids(reply)[:12]
    logits = engine.score([*prompt, *tokens])[len(prompt) - 1 : -1]
    assert allowed[logits[:, allowed].argmax(-1)].tolist() == tokens


def test_sampled_requests_with_one_token_to_choose_from_are_greedy(server, expected):
    sampling = {"temperature": 1.0, "top_k": 1, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    for prompt, continuation in zip(prompts(), expected):
        body = {"input_ids": prompt, "return_logprob": True, "sampling_params": sampling}
        assert output_ids(server.request("/generate", body)) == continuation.tokens


def test_new_weights_reach_the_draft_as_well(server, guessing_dir, expected):
    said = server.request("/update_weights_from_disk", {"model_path": str(guessing_dir)})
    assert said["success"], said
    reply = server.generate(prompts()[-1], NEW_TOKENS, -1)
    assert output_ids(reply) == expected[-1].tokens
    assert steps(reply) == (len(expected[-1].accepted), sum(expected[-1].accepted))


def test_what_the_host_would_not_apply_to_every_accepted_token_is_refused(server):
    for name, value in (("min_p", 0.1), ("frequency_penalty", 1.0), ("min_new_tokens", 3)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.request("/generate", {"input_ids": [5, 6], "sampling_params": {name: value}})
        assert f"{name}={value} cannot be served with a draft" in refused.value.read().decode()


def sampling_info(requests: list[tuple[float, int, float]]) -> SimpleNamespace:
    """(temperature, top_k, top_p) of each request, as the host's tensors hold them."""
    temperatures, top_ks, top_ps = zip(*requests)
    return SimpleNamespace(
        temperatures=torch.tensor(temperatures).unsqueeze(1),
        top_ks=torch.tensor(top_ks, dtype=torch.int32),
        top_ps=torch.tensor(top_ps),
    )


@pytest.mark.parametrize("cap", [None, 2])
def test_sampled_drafts_follow_the_law_of_each_request(cap):
    """The law of the first two tokens, by chi-squared, with the host's own numbers: 2**30 for a
    top_k that is none. A cap on the rows that are verified changes none of it."""
    from dsv4_plugin.host.dspark_worker import accept

    rounds, vocab = 5_000, 7
    kinds = [(1.0, 2**30, 1.0), (0.7, 3, 1.0), (1.4, 2**30, 0.8), (1.0, 4, 0.9)]
    logits = torch.randn(len(kinds), 3, vocab) * 1.5
    drawn_from = torch.randn(len(kinds), 2, vocab).softmax(-1)
    for kind, wanted, law in zip(kinds, logits, drawn_from):
        drafted = torch.stack([torch.multinomial(row, rounds, replacement=True) for row in law], 1)
        count, bonus, taken = accept(
            candidates=torch.cat((drafted.new_zeros(rounds, 1), drafted), 1),
            target_logits=wanted.repeat(rounds, 1),
            draft_probs=law.expand(rounds, -1, -1),
            sampling_info=sampling_info([kind] * rounds),
            cutoff_verify_lens=None if cap is None else torch.full((rounds,), cap),
        )
        assert (count + 1 <= (cap or 3)).all() and (taken >= 0).all()
        assert (count + taken <= 2).all() and (cap is not None or (taken == 0).all())
        temperature, top_k, top_p = kind
        expected = probabilities(wanted, temperature, min(top_k, vocab), top_p)
        first = torch.where(count > 0, drafted[:, 0], bonus)
        second = torch.where(count > 1, drafted[:, 1], bonus)[count > 0]
        for tokens, row in ((first, expected[0]), (second, expected[1])):
            if len(tokens):
                counts = torch.bincount(tokens, minlength=vocab)
                allowed = row > 0
                assert counts[~allowed].sum() == 0
                share = row[allowed].double()
                # One in a million: the draw is fixed, and 30 of them are asked.
                assert chisquare(counts[allowed], share / share.sum() * len(tokens)).pvalue > 1e-6


@pytest.mark.thorough
def test_neither_retraction_nor_mixed_chunks_nor_shorter_verifications_change_a_token(
    guessing_dir, tmp_path
):
    """In one scheduler of the host, eight requests at once, over rings of NaN."""
    schedulers = Schedulers()
    batch = [*prompts(), *(prompt[:60] for prompt in prompts())]
    lengths = [12 + 2 * n for n in range(len(batch))]

    def answer(*arguments, **options):
        options |= {"new_tokens": lengths, **EXACT}
        told = schedulers.run(
            guessing_dir, batch, "--max-total-tokens", "16384", *arguments, **options
        )
        # the host drops what a step accepts past the last token where it sends them
        told["tokens"] = [found[:n] for found, n in zip(told["tokens"], lengths)]
        return told

    table = tmp_path / "speeds.json"  # more than a few rows cost more than they bring
    rows, speeds = [1, 8, 16, 24, 32, 48], [100.0, 90.0, 60.0, 40.0, 30.0, 20.0]
    table.write_text(
        json.dumps(
            {
                "sample_batch_tokens": rows,
                "sample_steps_per_sec": speeds,
                "max_batch_tokens": 96,
            }
        )
    )
    by_speed = (*DSPARK, "--speculative-dspark-sps-table-path", str(table))
    try:
        plain = answer()["tokens"]
        for arguments, options, widest in (
            (DSPARK, {}, ROWS),
            (DSPARK, {"retract_every": 3}, ROWS),
            ((*DSPARK, "--chunked-prefill-size", "256", "--enable-mixed-chunk"), {}, ROWS),
            ((*DSPARK, "--speculative-dspark-block-size", "3"), {}, 4),
            (by_speed, {"SGLANG_RAGGED_VERIFY_MODE": "cap-accept"}, ROWS),
            (by_speed, {"SGLANG_RAGGED_VERIFY_MODE": "compact"}, None),
        ):
            told = answer(*arguments, **options)
            assert told["tokens"] == plain, arguments
            if widest:
                assert all(rows == widest * requests for requests, rows in told["verified"])
            else:  # some verifications are of fewer rows, and every request has its anchor
                assert all(rows >= requests for requests, rows in told["verified"])
                assert any(rows < ROWS * requests for requests, rows in told["verified"])
    finally:
        schedulers.close()


@pytest.mark.thorough
def test_many_streams_with_prefix_hits_and_aborts(server, engine):
    """Over prompts that share a page."""
    shared = prompts()[-1][:256]
    questions = [[*shared, *range(20 + n, 24 + 2 * n)] for n in range(16)]
    ask_many(server, questions, engine.generate(questions, NEW_TOKENS))


@pytest.mark.thorough
def test_the_trained_draft_over_http(tmp_path):
    """The shipped one gives the tokens of plain decoding, in the steps of our own engine."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(TRAINED / "tokenizer.json"))
    text = (TRAINED / "held_out.txt").read_text()[:6000]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    asked = [ids[:9], ids[50:300], ids[40:296], ids[200:720]]
    engine = engine_of(TRAINED, verify_rows=ROWS)
    plain = engine.generate(asked, NEW_TOKENS)
    drafted = [engine.speculate([p], NEW_TOKENS, DSparkDraft(engine))[0] for p in asked]
    with serving(TRAINED, tmp_path / "log", *DSPARK, **EXACT) as server:
        replies = [server.generate(prompt, NEW_TOKENS, -1) for prompt in asked]
    assert [output_ids(reply) for reply in replies] == plain == [d.tokens for d in drafted]
    assert [steps(reply) for reply in replies] == [
        (len(each.accepted), sum(each.accepted)) for each in drafted
    ]
    assert sum(sum(each.accepted) for each in drafted) > 0


@pytest.mark.thorough
def test_two_ranks_give_the_tokens_of_one(guessing_dir, expected, tmp_path):
    with serving(guessing_dir, tmp_path / "log", *DSPARK, "--tp", "2", **EXACT) as server:
        replies = [server.generate(prompt, NEW_TOKENS, -1) for prompt in prompts()]
        assert [output_ids(reply) for reply in replies] == [each.tokens for each in expected]
        accepted = [each.accepted for each in expected]
        assert [steps(reply) for reply in replies] == [(len(c), sum(c)) for c in accepted]
        sampling = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        for prompt in prompts():  # ranks that decided for themselves would wait for each other
            server.request("/generate", {"input_ids": prompt, "sampling_params": sampling})
