"""The MTP block of the older checkpoints behind the stock host's EAGLE worker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from live_server import ask_many, output_ids, output_logprobs, serving
from scipy.stats import chisquare

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.runtime import Engine
from dsv4_plugin.runtime.speculate import Continuation, MTPDraft

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
EXACT = {"DSV4_PRECISION": "exact"}
NEW_TOKENS = 24
STEPS = 3
TOLERANCE = 2e-5
"""Of a log-probability: two exact runs that batch the same tokens differently differ by 1e-5."""


def eagle(steps: int) -> tuple[str, ...]:
    return ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(steps))


def engine_of(directory: Path) -> Engine:
    torch.set_num_threads(1)  # fixtures of a module run before those of a test
    model = DeepseekV4(Geometry.from_dir(directory), Precision.EXACT)
    load_checkpoint(model, directory)
    return Engine(model, verify_rows=STEPS + 1)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engine_of(TINY)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Text that the checkpoint was not trained on: in a page, over its end, on it, and longer than
    a chunk of 256."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    text = (TINY / "held_out.txt").read_text()[:4000]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[:7], ids[10:260], ids[20:276], ids[100:620]]


@pytest.fixture(scope="module")
def expected(engine, prompts) -> list[Continuation]:
    """Greedy continuations without a draft, and what our own engine accepts of a chain."""
    plain = engine.generate(prompts, NEW_TOKENS)
    drafted = [engine.speculate([p], NEW_TOKENS, MTPDraft(engine, STEPS))[0] for p in prompts]
    assert [each.tokens for each in drafted] == plain
    assert {0, 1, 2, 3} <= {count for each in drafted for count in each.accepted}
    return drafted


@pytest.mark.thorough
def test_the_golden_logits_of_the_block(schedulers, golden_dir, golden, tmp_path):
    """Two chunks of one prompt: of every row but the last, which is followed by a token that the
    server picks."""
    prompt = golden["input_ids_1"].tolist()
    schedulers.run(
        golden_dir,
        [prompt],
        *eagle(1),
        *("--chunked-prefill-size", "256", "--max-total-tokens", "16384"),
        new_tokens=[2],
        draft_logits=str(tmp_path),
        **EXACT,
    )
    first, second, *_ = torch.load(tmp_path / "rank0.pt")
    assert (len(first), len(second)) == (256, len(prompt) - 256)
    rows = golden["positions_1"][:-1]
    found = torch.cat((first, second))[rows].log_softmax(-1)
    wanted = golden["mtp_logits_1"][:-1].log_softmax(-1)
    following = golden["input_ids_1"][rows + 1].unsqueeze(-1)
    # Two implementations differ by at most 2.4e-5 (tests/data/golden/README.md); four times that.
    assert (found - wanted).gather(1, following).abs().max() <= 1e-4


@pytest.mark.parametrize("steps", [STEPS, pytest.param(1, marks=pytest.mark.thorough)])
def test_neither_drafts_nor_retraction_change_a_token(schedulers, engine, prompts, expected, steps):
    """Eight requests at once over rings of NaN, in chunks of a page; some are taken back."""
    batch = [*prompts, *(prompt[:60] for prompt in prompts)]
    lengths = [NEW_TOKENS - n for n in range(len(batch))]
    told = schedulers.run(
        TINY,
        batch,
        *eagle(steps),
        *("--chunked-prefill-size", "256", "--max-total-tokens", "16384"),
        new_tokens=lengths,
        retract_every=4,
        **EXACT,
    )
    plain = [each.tokens for each in expected] + engine.generate(batch[4:], NEW_TOKENS)
    # The host drops what a step accepts past the last token where it sends them.
    assert [found[:n] for found, n in zip(told["tokens"], lengths)] == [
        tokens[:n] for tokens, n in zip(plain, lengths)
    ]
    assert told["retracted"] > 0
    assert all(rows == (steps + 1) * requests for requests, rows in told["verified"])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--chunked-prefill-size", "256", *eagle(STEPS))
    with serving(TINY, log, *options, tokenizer=True, **EXACT) as running:
        yield running


def steps_of(reply: dict) -> tuple[int, int]:
    """(verifications, drafted tokens that stayed) of a request, by the host's account."""
    told = reply["meta_info"]
    return told["spec_verify_ct"], told["spec_num_correct_drafts"]


@pytest.mark.thorough
def test_over_http_the_tokens_and_the_steps_of_our_own_engine(server, prompts, expected):
    """Twice: the second time the pages of the longest prompt are there, and the draft's windows
    with them."""
    for cached in (0, 512):
        replies = [server.generate(prompt, NEW_TOKENS, -1) for prompt in prompts]
        assert [output_ids(reply) for reply in replies] == [each.tokens for each in expected]
        assert [steps_of(reply) for reply in replies] == [
            (len(each.accepted), sum(each.accepted)) for each in expected
        ]
        assert replies[-1]["meta_info"]["cached_tokens"] == cached


@pytest.mark.thorough
def test_log_probabilities_of_accepted_tokens(server, engine, prompts, expected):
    for prompt, continuation in zip(prompts, expected):
        reply = server.generate(prompt, NEW_TOKENS, -1)
        logits = engine.score([*prompt, *continuation.tokens])[len(prompt) - 1 : -1]
        of_tokens = torch.log_softmax(logits, -1).gather(
            1, torch.tensor(continuation.tokens).unsqueeze(1)
        )
        found = torch.tensor(output_logprobs(reply))
        assert (found - of_tokens.squeeze(1)).abs().max() <= TOLERANCE


@pytest.mark.thorough
def test_sampled_requests_with_one_token_to_choose_from_are_greedy(server, prompts, expected):
    sampling = {"temperature": 1.0, "top_k": 1, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    for prompt, continuation in zip(prompts, expected):
        for law in (sampling, sampling | {"top_k": -1, "top_p": 1e-6}):
            body = {"input_ids": prompt, "return_logprob": True, "sampling_params": law}
            assert output_ids(server.request("/generate", body)) == continuation.tokens


@pytest.mark.thorough
def test_a_grammar_masks_every_row_that_is_verified(server, prompts):
    sampling = {"temperature": 0, "max_new_tokens": 20, "regex": "[a-f]{12}"}
    reply = server.request("/generate", {"input_ids": prompts[0], "sampling_params": sampling})
    assert re.fullmatch("[a-f]{12}", reply["text"])


@pytest.mark.thorough
def test_many_streams_with_prefix_hits_and_aborts(server, engine, prompts):
    """Over prompts that share a page."""
    shared = prompts[-1][:256]
    questions = [[*shared, *prompts[-1][260 + n : 270 + 2 * n]] for n in range(16)]
    ask_many(server, questions, engine.generate(questions, NEW_TOKENS))


@pytest.mark.thorough
def test_two_ranks_give_the_tokens_of_one(prompts, tmp_path):
    """Of random weights, whose drafts are refused: every verification is cut back to its anchor."""
    directory = tmp_path / "model"
    write_tiny(directory, tiny_config(hidden=128, intermediate=256, index_topk=16), seed=3)
    ids = [[token % 120 + 2 for token in prompt] for prompt in prompts]
    plain = engine_of(directory).generate(ids, NEW_TOKENS)
    with serving(directory, tmp_path / "log", *eagle(2), "--tp", "2", **EXACT) as server:
        replies = [server.generate(prompt, NEW_TOKENS, -1) for prompt in ids]
        assert [output_ids(reply) for reply in replies] == plain
        sampling = {"temperature": 1.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        for prompt in ids:  # ranks that decided for themselves would wait for each other
            server.request("/generate", {"input_ids": prompt, "sampling_params": sampling})


def chain(*sizes: int) -> dict[str, torch.Tensor]:
    rows, columns = sizes
    return {
        "predicts": torch.zeros(rows * columns, dtype=torch.int32),
        "accept_index": torch.full(sizes, -1, dtype=torch.int32),
        "accept_token_num": torch.empty(rows, dtype=torch.int32),
    }


def test_greedy_chains_stay_as_long_as_the_target_agrees():
    from dsv4_plugin.host.mtp_worker import fill_bonus_tokens, verify_chain

    candidates = torch.tensor([[9, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 3]])
    choice = torch.tensor([[1, 2, 3, 4], [1, 7, 3, 5], [8, 2, 3, 6]])
    out = chain(3, 4)
    none = torch.empty(0)
    verify_chain(*out.values(), candidates, none, none, none, choice)
    assert out["accept_token_num"].tolist() == [3, 1, 0]
    assert out["accept_index"].tolist() == [[0, 1, 2, 3], [4, 5, -1, -1], [8, -1, -1, -1]]
    bonus = torch.empty(3, dtype=torch.int32)
    tokens = out["predicts"][out["accept_index"]]
    fill_bonus_tokens(tokens, out["accept_token_num"] + 1, bonus, 4, 3)
    assert bonus.tolist() == [4, 7, 8]


def test_sampled_chains_follow_the_law_of_each_request():
    """The law of the first two tokens, by chi-squared, with what the host renormalises for top_k
    and top_p."""
    from dsv4_plugin.host.mtp_worker import sample_chain, top_k_renorm, top_p_renorm

    rounds, vocab = 5_000, 7
    for top_k, top_p in ((2**30, 1.0), (3, 1.0), (2**30, 0.8), (4, 0.9)):
        law = (torch.randn(3, vocab) * 1.5).softmax(-1)
        law = top_p_renorm(top_k_renorm(law, torch.full((3,), top_k)), torch.full((3,), top_p))
        assert (law > 0).sum(-1).max() <= top_k
        torch.testing.assert_close(law.sum(-1), torch.ones(3))
        out = chain(rounds, 3)
        drafted = law[:2].argmax(-1)
        sample_chain(
            **out,
            candidates=torch.cat((torch.zeros(1, dtype=torch.int64), drafted)).expand(rounds, 3),
            uniform_samples=torch.rand(rounds, 3),
            uniform_samples_for_final_sampling=torch.rand(rounds),
            target_probs=law.expand(rounds, 3, vocab),
        )
        count, tokens = out["accept_token_num"], out["predicts"].view(rounds, 3)
        for row, found in enumerate((tokens[:, 0], tokens[count > 0, 1])):
            counts, allowed = torch.bincount(found, minlength=vocab), law[row] > 0
            assert counts[~allowed].sum() == 0
            share = law[row][allowed].double()
            # One in a million: the draw is fixed, and eight of them are asked.
            assert chisquare(counts[allowed], share / share.sum() * len(found)).pvalue > 1e-6


def test_the_renormalised_law_is_that_of_the_engine():
    from dsv4_plugin.host.mtp_worker import top_k_renorm, top_p_renorm
    from dsv4_plugin.ops.accept import probabilities

    logits = torch.randn(5, 40)
    law = logits.softmax(-1)
    for top_k, top_p in ((7, 1.0), (40, 0.6), (9, 0.7)):
        found = top_p_renorm(top_k_renorm(law, torch.full((5,), top_k)), torch.full((5,), top_p))
        torch.testing.assert_close(found, probabilities(logits, 1.0, top_k, top_p))
