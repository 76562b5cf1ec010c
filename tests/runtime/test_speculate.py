"""Speculation changes the number of steps and nothing else: rollback to every length, greedy
tokens, the law of sampled ones, the account of what was accepted.

Equal tokens prove little: a compressor that lost a row gives logits that are off by 1e-3 and the
same tokens. So logits are compared, over rings that start as NaN.
"""

from __future__ import annotations

import functools
import random
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from dsv4_plugin.cache.step_plan import RING_ROWS
from dsv4_plugin.config import Precision
from dsv4_plugin.ops.accept import probabilities
from dsv4_plugin.runtime import Engine
from dsv4_plugin.runtime import engine as engine_module
from dsv4_plugin.runtime.speculate import Continuation, DSparkDraft, MTPDraft, Sampling, Speculation

from .conftest import load
from .rows_alike import RowsAlike
from .test_chunks import distance, share

ROWS = 6
"""Of a verification: the anchor and five drafts."""
TOLERANCE = 2e-5
"""Two exact runs that batch the same tokens differently differ by 1e-5 of logits near 2."""
STARTS = (1, 4, 119, 122, 125, 127, 128, 247, 250, 253, 255, 256)
"""Every residue of 4, steps over the ends of windows of 128 and over the end of a page."""
STEPS = 3


@pytest.fixture(scope="module")
def text() -> list[int]:
    return torch.randint(2, 320, (320,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def plain(small_model, text):
    """Logits of the text in one chunk."""
    with RowsAlike():
        return Engine(small_model("exact")).score(text)


def engine_of(model, **options) -> Engine:
    return Engine(model, max_tokens=12288, max_requests=len(STARTS) + 2, **options)


def verify(engine, batch, text, kept) -> list[torch.Tensor]:
    """One verification of all sequences, of whose drafts the first `kept` are those of the text;
    their logits, one row for each token that stays."""
    rows, starts = [], [sequence.length for sequence in batch]
    for start, count in zip(starts, kept):
        drafts = text[start + 1 : start + ROWS]
        wrong = [(token + 7) % 300 + 2 for token in drafts[count:]]
        rows += [text[start], *drafts[:count], *wrong]
    plan = engine.plan([(sequence, ROWS) for sequence in batch], may_shrink=True)
    with torch.inference_mode():
        streams = engine.model(engine.ids(rows), plan, engine.caches)
    logits = engine.logits(streams).split(ROWS)
    for sequence, start, count in zip(batch, starts, kept):
        engine.cut(sequence, start + 1 + count)
    return [part[: count + 1] for part, count in zip(logits, kept)]


def furthest(engine, text, plain, chance) -> float:
    """The largest difference of a logit over some verifications that keep any number of drafts, and
    a plain step after them."""
    batch = [engine.open() for _ in STARTS]
    engine.forward([(s, text[:start]) for s, start in zip(batch, STARTS)])
    worst = 0.0
    for _ in range(STEPS):
        kept = [chance.randrange(ROWS) for _ in batch]
        starts = [sequence.length for sequence in batch]
        for start, got in zip(starts, verify(engine, batch, text, kept)):
            worst = max(worst, distance(got, plain[start : start + len(got)]))
    starts = [sequence.length for sequence in batch]
    got = engine.logits(engine.forward([(s, [text[s.length]]) for s in batch]))
    for sequence in batch:
        engine.close(sequence)
    return max(worst, distance(got, plain[starts]))


@pytest.mark.parametrize("seed", range(2))
def test_any_number_of_drafts_may_be_taken_back(small_model, text, plain, rows_alike, seed):
    engine = engine_of(small_model("exact"), page_seed=seed, verify_rows=ROWS)
    assert furthest(engine, text, plain, random.Random(seed)) <= TOLERANCE


@pytest.mark.parametrize("residue", range(4))
def test_every_count_at_every_residue(small_model, text, plain, rows_alike, residue):
    engine = engine_of(small_model("exact"), verify_rows=ROWS)
    batch = [engine.open() for _ in range(ROWS)]
    for start in (121 + residue, 249 + residue):
        for sequence in batch:
            engine.close(sequence)
        batch = [engine.open() for _ in range(ROWS)]
        engine.forward([(s, text[:start]) for s in batch])
        for count, got in enumerate(verify(engine, batch, text, range(ROWS))):
            assert distance(got, plain[start : start + len(got)]) <= TOLERANCE, count
        for _ in range(5):  # until what was taken back is in a window of 4 and its overlap
            at = [s.length for s in batch]
            got = engine.logits(engine.forward([(s, [text[s.length]]) for s in batch]))
            assert distance(got, plain[at]) <= TOLERANCE, start


@pytest.mark.parametrize(
    "small_rings, shrinks", [(True, True), (False, False)], ids=["small rings", "another plan"]
)
def test_either_half_alone_is_wrong(
    small_model, text, plain, rows_alike, monkeypatch, small_rings, shrinks
):
    """Rings of twice the rows and a plan that keeps every row: one without the other reads rows
    that nobody wrote, or those of refused drafts."""
    if small_rings:
        monkeypatch.setattr(engine_module, "SPECULATION_RING_ROWS", RING_ROWS)
        monkeypatch.setattr(engine_module, "shrinkable_rows", lambda ratio, ring: ROWS)
    engine = engine_of(small_model("exact"), verify_rows=ROWS)
    if not shrinks:
        plan = engine.plan
        monkeypatch.setattr(engine, "plan", lambda batch, may_shrink=False: plan(batch))
    assert furthest(engine, text, plain, random.Random(0)) > 10 * TOLERANCE


def test_a_prefix_is_continued_after_drafts_past_its_page_were_taken_back(
    small_model, text, plain, rows_alike
):
    for kept in (0, 2, 5):
        engine = engine_of(small_model("exact"), verify_rows=ROWS, page_seed=kept)
        sequence = engine.open()
        engine.forward([(sequence, text[:253])])
        while sequence.length < 256:
            verify(engine, [sequence], text, [kept])
        other = share(engine, sequence, 1)
        got = engine.logits(engine.forward([(other, text[256:300])]))
        assert distance(got, plain[256:300]) <= TOLERANCE, kept


def test_a_chunk_follows_drafts_that_were_taken_back(small_model, text, plain, rows_alike):
    engine = engine_of(small_model("exact"), verify_rows=ROWS)
    batch = [engine.open() for _ in range(ROWS)]
    engine.forward([(s, text[:123]) for s in batch])
    verify(engine, batch, text, range(ROWS))
    at = [s.length for s in batch]
    got = engine.logits(engine.forward([(s, text[s.length : 200]) for s in batch]))
    for start, part in zip(at, got.split([200 - start for start in at])):
        assert distance(part, plain[start:200]) <= TOLERANCE, start


def test_too_many_rows_for_the_rings(small_model):
    with pytest.raises(ValueError, match="verify_rows is 11; rings of .* serve up to 10"):
        Engine(small_model("exact"), verify_rows=11)
    engine = Engine(small_model("exact"))
    with pytest.raises(ValueError, match="steps of 6 rows, and this engine has verify_rows 1"):
        engine.speculate([[5]], 4, Forced([], ROWS - 1))


class Forced:
    """A draft that proposes what follows in known texts, wrong where `wrong(place)` says so."""

    def __init__(self, texts, width, wrong=lambda place: False):
        self.texts, self.width, self.wrong = texts, width, wrong
        self.seen, self.lengths = 0, []

    def observe(self, seen):
        self.seen += int(seen.kept.sum())

    def propose(self, sequences, anchors, pick):
        rows = []
        for sequence in sequences:
            text = self.texts[sequence.row]
            row = (text[sequence.length + 1 :] + [2] * self.width)[: self.width]
            rows.append(
                [(t + 1) % 300 if self.wrong(sequence.length + i) else t for i, t in enumerate(row)]
            )
        tokens = torch.tensor(rows)
        return tokens, torch.nn.functional.one_hot(tokens, 320).float() * 100


@pytest.fixture(scope="module")
def model(dspark_dir):
    return load(dspark_dir, Precision.EXACT)


PROMPTS = [list(range(3, 60)), list(range(5, 131)), [9, 8, 7]]
NEW = 19


@pytest.fixture(scope="module")
def greedy(model):
    return Engine(model, max_tokens=2048).generate(PROMPTS, NEW)


def drafting_engine(model, **options) -> Engine:
    return Engine(model, max_tokens=2048, max_requests=48, verify_rows=ROWS, **options)


def test_greedy_tokens_with_the_draft_are_those_without(model, greedy):
    engine = drafting_engine(model, page_seed=2)
    out = engine.speculate(PROMPTS, NEW, DSparkDraft(engine), chunk=50)
    assert [each.tokens for each in out] == greedy
    engine = drafting_engine(model)
    assert engine.generate(PROMPTS, NEW, draft=DSparkDraft(engine)) == greedy


@pytest.mark.parametrize("width", [1, 3])
def test_greedy_tokens_with_the_older_draft_are_those_without(golden_model, golden, width):
    """The golden checkpoint's MTP block. What it proposes first is what it was checked for
    (test_golden.py): its logits in one prefill of all that it has read."""
    model = golden_model("exact")
    prompts = [golden["input_ids_2"].tolist()[:count] for count in (37, 130)]
    wanted = Engine(model, max_tokens=1024).generate(prompts, 12)
    engine = drafting_engine(model)
    draft, first = MTPDraft(engine, width), []
    propose = draft.propose

    def proposing(sequences, anchors, pick):
        tokens, logits = propose(sequences, anchors, pick)
        first.append((sequences[0].length, logits[0, 0]))
        return tokens, logits

    draft.propose = proposing
    out = engine.speculate(prompts[:1], 12, draft) + engine.speculate(prompts[1:], 12, draft)
    assert [each.tokens for each in out] == wanted
    assert all(count <= width for each in out for count in each.accepted)
    # The anchor is the token after those read: the block has seen it, the backbone has not.
    text, (length, logits) = prompts[0] + wanted[0], first[3]
    expected = Engine(model).score_draft(text[: length + 1])[length - 1]
    assert (logits - expected).abs().max() <= TOLERANCE


def test_a_draft_that_knows_is_accepted_whole(model, greedy):
    engine = drafting_engine(model)
    rows = [engine._rows[-1 - index] for index in range(len(PROMPTS))]
    texts = {row: prompt + tokens for row, prompt, tokens in zip(rows, PROMPTS, greedy)}
    out = engine.speculate(PROMPTS, NEW, Forced(texts, ROWS - 1))
    assert [each.tokens for each in out] == greedy
    # One token comes with the prompt, six with each verification: 1 + 3 * 6 = 19.
    assert [each.accepted for each in out] == [[5] * 3] * 3


@pytest.mark.parametrize("every", [2, 3, 7])
def test_a_draft_that_is_sometimes_wrong(model, greedy, every):
    engine = drafting_engine(model)
    rows = [engine._rows[-1 - index] for index in range(len(PROMPTS))]
    texts = {row: prompt + tokens for row, prompt, tokens in zip(rows, PROMPTS, greedy)}
    draft = Forced(texts, ROWS - 1, lambda place: place % every == 0)
    out = engine.speculate(PROMPTS, NEW, draft)
    assert [each.tokens for each in out] == greedy
    # The account: every verification commits its anchor and what it accepted; the tokens that came
    # past the last wanted one are all that is not in the output.
    committed = sum(1 + count for each in out for count in each.accepted)
    assert draft.seen == sum(map(len, PROMPTS)) + committed
    dropped = committed - sum(len(each.tokens) - 1 for each in out)
    assert 0 <= dropped < ROWS * len(PROMPTS)


def test_sampled_tokens_follow_the_targets_law(model):
    """What comes after one anchor, verified again and again: the first token always, the second
    where the first was a draft that stayed. top_k leaves few tokens, and their law is computed from
    the target alone."""
    sampling = Sampling(temperature=0.8, top_k=4, top_p=0.95)
    prompt, count, repeats = [9, 8, 7, 30, 31], 40, 12

    @functools.cache
    def law(*tokens):
        logits = drafting_engine(model).score([*prompt, *tokens])[-1]
        return probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)

    engine = drafting_engine(model)
    batch = [engine.open() for _ in range(count)]
    engine.forward([(sequence, prompt[:-1]) for sequence in batch])
    likely = law().nonzero().flatten().tolist()
    speculation = Speculation(engine, Likely(likely), sampling)
    first, second = Counter(), Counter()
    for _ in range(repeats):
        out = [Continuation(prompt[-1:]) for _ in batch]
        with torch.inference_mode():
            speculation.step(list(zip(batch, out)))
        for sequence, each in zip(batch, out):
            engine.cut(sequence, len(prompt) - 1)
            first[each.tokens[1]] += 1
            if each.accepted[0]:
                second[tuple(each.tokens[1:3])] += 1
    assert 0.1 < second.total() / first.total() < 0.9  # both ways to a token are taken
    wanted = {token: law()[token].item() * first.total() for token in likely}
    after = Counter()
    for (token, _), number in second.items():
        after[token] += number
    pairs = {
        (token, follower): law(token)[follower].item() * number
        for token, number in after.items()
        for follower in law(token).nonzero().flatten().tolist()
    }
    for found, expected in ((first, wanted), (second, pairs)):
        assert found.keys() <= expected.keys()
        cells = [(found[cell], value) for cell, value in expected.items() if value >= 5]
        share = sum(number for number, _ in cells) / sum(value for _, value in cells)
        result = chisquare([number for number, _ in cells], [share * value for _, value in cells])
        print(f"{sum(found.values())} tokens in {len(cells)} cells, p = {result.pvalue:.3f}")
        assert len(cells) > 1 and result.pvalue > 1e-3


class Likely:
    """A draft that prefers some tokens, all the same."""

    width = ROWS - 1

    def __init__(self, tokens):
        self.logits = torch.full((320,), -5.0)
        self.logits[tokens] = 0.0

    def observe(self, seen):
        pass

    def propose(self, sequences, anchors, pick):
        logits = self.logits.expand(len(sequences), self.width, -1)
        return torch.stack([pick(logits[:, j]) for j in range(self.width)], 1), logits
