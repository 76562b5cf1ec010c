"""The gate's measures against plain computations, its margins, and `dsv4 eval --tiny` on a
checkpoint of random weights."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F

from dsv4_plugin import flags
from dsv4_plugin.accuracy import gate
from dsv4_plugin.accuracy.eval_set import (
    QUICK,
    WORST,
    Document,
    EvalSize,
    Measured,
    Proportion,
    _recalled,
    accepted_length,
    build_eval_set,
    divergence,
    measure,
)
from dsv4_plugin.accuracy.score import EvalError, Score
from dsv4_plugin.cli import main
from dsv4_plugin.config import Precision
from dsv4_plugin.ops.operator import OPERATORS, SelectionError
from dsv4_plugin.runtime.speculate import DSparkDraft, Sampling, Speculation

from .faults import FAULTS, changed

SMALL = EvalSize(((64, 1, 2), (300, 1, 3)), windows=2, window=128)


@pytest.fixture(scope="module")
def eval_set(random_dir):
    return build_eval_set(random_dir, 0, SMALL)


@pytest.fixture(scope="module")
def engine(random_dir, eval_set):
    return gate.load_engine(random_dir, Precision.EXACT, "cpu", eval_set.longest)


@pytest.fixture(scope="module")
def measured(engine, eval_set):
    return measure(engine, eval_set)


@pytest.fixture(scope="module")
def drafting_dir(dspark_dir, random_dir, tmp_path_factory):
    """A checkpoint with a DSpark draft of random weights and the same tokenizer and text."""
    directory = shutil.copytree(dspark_dir, tmp_path_factory.mktemp("gate") / "dspark")
    shutil.copy(random_dir / "held_out.txt", directory)
    return directory


class TestAcceptedLength:
    def test_is_what_decoding_says(self, drafting_dir, eval_set):
        """The drafts at a place against tokens decoded from there without a draft."""
        engine = gate.load_engine(drafting_dir, Precision.EXACT, "cpu", eval_set.longest)
        found = accepted_length(engine, eval_set)
        # 129 tokens a window, a block after every 32.
        places = (32, 64, 96, 128)
        assert list(found.items) == [f"window {n}, token {p}" for n in (0, 1) for p in places]
        for number, window in enumerate(eval_set.windows):
            for place in places:
                plain = engine.generate([list(window[: place + 1])], 5)[0]
                sequence = engine.open()
                speculation = Speculation(engine, DSparkDraft(engine), Sampling())
                with torch.inference_mode():
                    speculation.read(sequence, list(window[:place]))
                    engine.reserve([sequence], 6)
                    drafted, _ = speculation.draft.propose(
                        [sequence], torch.tensor([window[place]]), lambda x: x.argmax(-1)
                    )
                engine.close(sequence)
                same = [a == b for a, b in zip(drafted[0].tolist(), plain)]
                count = same.index(False) if False in same else 5
                assert found.items[f"window {number}, token {place}"] == 1 + count

    def test_has_a_margin(self, measured):
        def row(lengths):
            score = Score("unseen text", "tokens per verification", dict(enumerate(lengths)))
            return dataclasses.replace(measured, accepted_length=score)

        reference = row([3.0, 2.0, 4.0])
        for lengths, passed in (([3.0, 2.0, 4.0], True), ([3.0, 1.0, 4.0], False)):
            rows = list(gate.judge("s", row(lengths), reference))
            assert [r.passed for r in rows if r.measure == "accepted length"] == [passed]
        assert "accepted length" not in {r.measure for r in gate.judge("s", measured, measured)}

    def test_the_command_measures_it(self, drafting_dir, capsys):
        status, said = evaluate_in(
            capsys, "--tiny", drafting_dir, "--quick", "--precision", "serving"
        )
        assert "accepted length" in said


def evaluate_in(capsys, *words):
    status = main(["eval", *map(str, words)])
    return status, capsys.readouterr().out


class TestShare:
    @pytest.mark.parametrize(
        "hits, count", [(0, 8), (8, 8), (3, 8), (23, 24), (1, 1), (4011, 4088)]
    )
    def test_wilson_as_scipy_has_it(self, hits, count):
        from scipy.stats import binomtest

        want = binomtest(hits, count).proportion_ci(0.95, method="wilson")
        # Both are double precision.
        assert Proportion(hits, count).interval == pytest.approx((want.low, want.high), abs=1e-12)


class TestEvalSet:
    def test_things_follow_their_cues(self, eval_set, random_dir):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(random_dir / "tokenizer.json"))
        for documents in eval_set.documents.values():
            for asked in documents:
                assert asked.ids[0] == 0 and asked.things
                for at, thing in asked.things:
                    assert asked.ids[at : at + len(thing)] == list(thing)
                    name = tokenizer.decode(asked.ids[:at]).rsplit(" ", 2)
                    assert name[2] == "likes"
                    # The same sentence was told before.
                    sentence = f" {name[1]} likes{tokenizer.decode(list(thing))}."
                    assert sentence in tokenizer.decode(asked.ids[1:at])

    def test_a_document_is_as_a_server_sees_it(self, eval_set, random_dir):
        """Cut at the things and encoded piece by piece, or at once: the same tokens."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(random_dir / "tokenizer.json"))
        [asked] = eval_set.documents[64]
        assert (
            tokenizer.encode(tokenizer.decode(asked.ids[1:]), add_special_tokens=False).ids
            == asked.ids[1:]
        )

    def test_windows_are_unseen_text(self, eval_set, text):
        assert [len(window) for window in eval_set.windows] == [129, 129] and eval_set.windows[
            0
        ] != eval_set.windows[1]
        # A byte is 3 more than its value, and the text is ASCII: a byte a token.
        assert bytes(token - 3 for token in eval_set.windows[0][1:]).decode() == text[:128]
        assert eval_set.bytes_per_token == 1

    @pytest.mark.parametrize("missing", ["held_out.txt", "tokenizer.json"])
    def test_missing_files(self, random_dir, tmp_path, missing):
        directory = shutil.copytree(random_dir, tmp_path / "model")
        (directory / missing).unlink()
        with pytest.raises(EvalError, match=missing):
            build_eval_set(directory, 0, SMALL)

    def test_too_little_text(self, random_dir):
        with pytest.raises(EvalError, match="1000 windows of 128 need more"):
            build_eval_set(random_dir, 0, EvalSize(((64, 1, 1),), windows=1000, window=128))


class TestMeasure:
    def test_loss(self, engine, eval_set, measured):
        """torch's own cross-entropy over one prefill of each window."""
        losses = [
            F.cross_entropy(engine.score(list(window[:-1])), torch.tensor(window[1:]))
            for window in eval_set.windows
        ]
        # fp32 sums in another order.
        assert measured.loss.mean == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert measured.tokens == 256 and len(measured.loss.items) == 2

    def test_acceptance_is_that_of_speculative_decoding(self, engine, eval_set, measured):
        """Step by step: a draft for t + 2 is kept when the backbone, given t + 1, says the same."""
        hits = 0
        for window in eval_set.windows:
            ids = list(window[:-1])
            drafts, truth = engine.score_draft(ids, [1, 7] * 16), engine.score(ids, [16] * 8)
            hits += sum(
                int(drafts[at].argmax()) == int(truth[at + 1].argmax())
                for at in range(len(ids) - 1)
            )
        assert measured.acceptance.count == 2 * 127
        # A near tie of two tokens may fall the other way when chunks differ.
        assert abs(measured.acceptance.hits - hits) <= 2

    def test_recall_of_a_model_that_knows_nothing(self, measured):
        assert {
            distance: (share.hits, share.count) for distance, share in measured.recall.items()
        } == {64: (0, 2), 300: (0, 3)}

    def test_recall_counts_what_the_model_would_say(self, engine, eval_set):
        """Were each thing what greedy decoding gives after its cue, all trials would be hits."""
        [asked] = eval_set.documents[64]
        at, thing = asked.things[0]
        said = engine.generate([asked.ids[:at]], len(thing))[0]
        ids = asked.ids[:at] + said
        assert _recalled(engine, Document(ids, ((at, tuple(said)),)))[0] == 1
        assert _recalled(engine, Document(ids, ((at, (*said[:-1], said[-1] ^ 1)),)))[0] == 0


def test_logits_that_are_no_numbers_have_the_worst_loss(engine, eval_set):
    # by the sink: a BLAS may take no notice of a factor alpha that is no number
    with changed(("sparse_mla",), sink=lambda sink: torch.full_like(sink, math.nan)):
        assert set(measure(engine, eval_set).loss.items.values()) == {WORST}


EVEN = torch.zeros(256, 4).log_softmax(-1)
"""Predictions of 256 tokens that know nothing of 4 words."""


def answers(recall: dict[int, tuple[int, int]], loss=(2.0, 2.1, 1.9), accepted=90) -> Measured:
    return Measured(
        {distance: Proportion(*share) for distance, share in recall.items()},
        Score("unseen text", "nats per token", dict(zip("abc", loss))),
        Proportion(accepted, 100),
        (EVEN,),
        {distance: EVEN[:count] for distance, (_, count) in recall.items()},
    )


class TestJudge:
    def failed(self, measured, reference=None):
        reference = reference or answers(
            {distance: (share.count, share.count) for distance, share in measured.recall.items()}
        )
        return [row.measure for row in gate.judge("s", measured, reference, 3.0) if not row.passed]

    def test_all_is_well(self):
        assert self.failed(answers({64: (20, 20), 1024: (19, 20), 8192: (16, 20)})) == []

    @pytest.mark.parametrize(
        "recall, failed",
        [
            ({64: (18, 20)}, ["recall, window"]),
            ({1024: (18, 20)}, ["recall, 1k"]),
            ({4096: (18, 20)}, ["recall, 4k"]),
            ({8192: (15, 20)}, ["recall, 8k"]),
            ({64: (0, 8), 300: (0, 8)}, ["recall, window", "recall, 300"]),
        ],
    )
    def test_recall(self, recall, failed):
        assert self.failed(answers(recall)) == failed

    def test_loss_is_a_paired_difference(self):
        """Of (0.03, 0.02, 0.04) the mean is 0.03 and the standard error 0.01 / sqrt(3)."""
        rows = {
            row.measure: row
            for row in gate.judge(
                "s", answers({64: (8, 8)}, (2.03, 2.12, 1.94)), answers({64: (8, 8)}), 3.0
            )
        }
        above = rows["loss above exact"]
        assert (
            above.value == pytest.approx(0.03)
            and not above.passed
            and above.most == gate.MARGINS["loss"].limit
        )
        # 1.959964: the 97.5th percentile of the normal distribution.
        assert above.high - above.value == pytest.approx(1.959964 * 0.01 / math.sqrt(3))
        assert rows["loss, nats per token"].value == pytest.approx(2.03)
        assert rows["loss, nats per byte"].value == pytest.approx(2.03 / 3)

    def test_what_is_no_number_keeps_no_margin(self):
        assert (
            not gate.Row("s", "m", math.nan, 0, 0, 1, least=0.5).passed
            and not gate.Row("s", "m", math.nan, 0, 0, 1, most=0.5).passed
        )

    def test_divergence_is_that_of_torch(self, measured):
        """The loss may stay where predictions move: here to 0.4, 0.3, 0.2, 0.1 from a quarter each,
        in half of the tokens."""
        moved = EVEN.clone()
        moved[128:] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        changed = dataclasses.replace(answers({64: (8, 8)}), predictions=(moved,))
        rows = {row.measure: row for row in gate.judge("s", changed, answers({64: (8, 8)}))}
        want = F.kl_div(moved, EVEN, log_target=True, reduction="batchmean").item()
        assert (
            rows["divergence from exact"].value == pytest.approx(want, rel=1e-5)
            and want > gate.MARGINS["divergence"].limit
        )
        assert (
            self.failed(changed) == ["divergence from exact"]
            and rows["loss above exact"].value == 0
        )
        assert divergence(measured, measured).mean == 0

    def test_things_that_are_less_sure(self):
        """All right, but of 8 that were even one now has (0.97, 0.01, 0.01, 0.01)."""
        moved = EVEN[:8].clone()
        moved[3] = torch.tensor([0.97, 0.01, 0.01, 0.01]).log()
        changed = dataclasses.replace(answers({1024: (8, 8)}), things={1024: moved})
        rows = {row.measure: row for row in gate.judge("s", changed, answers({1024: (8, 8)}))}
        want = sum(0.25 * math.log(0.25 / q) for q in (0.97, 0.01, 0.01, 0.01)) / 8
        assert (
            rows["divergence of things, 1k"].value == pytest.approx(want, rel=1e-4)
            and rows["divergence of things, 1k"].count == 8
        )
        assert self.failed(changed) == ["divergence of things, 1k"]

    @pytest.mark.parametrize("accepted, failed", [(85, []), (84, ["drafts accepted"])])
    def test_acceptance(self, accepted, failed):
        assert self.failed(answers({64: (8, 8)}, accepted=accepted)) == failed

    def test_the_reference_itself_has_recall_alone_to_keep(self):
        rows = list(gate.judge("exact", answers({64: (1, 8)}), None))
        assert [row.measure for row in rows if row.why] == ["recall, window"]


class TestSettings:
    def test_references_are_not_measured_twice(self):
        assert [
            each.name for each in gate.settings(["exact", "official", "serving"], {}, gpu=False)
        ] == ["official", "serving"]
        assert [each.name for each in gate.settings(["exact", "serving"], {}, gpu=True)] == [
            "exact",
            "serving",
        ]
        assert [
            each.name for each in gate.settings(["exact"], {"DSV4_PROFILE": "safe"}, gpu=True)
        ] == []
        assert [
            each.name for each in gate.settings(["exact"], {"DSV4_SPARSE_MLA": "triton"}, gpu=False)
        ] == ["exact"]

    def test_what_is_chosen(self):
        environ = {
            "DSV4_MOE": "triton",
            "DSV4_PRECISION": "exact",
            "HOME": "/",
            "SGLANG_HACK_FLASHMLA_BACKEND": "triton",
        }
        assert gate.chosen(environ, "safe", ["topk_select=triton"]) == {
            "DSV4_MOE": "triton",
            "SGLANG_HACK_FLASHMLA_BACKEND": "triton",
            "DSV4_PROFILE": "safe",
            "DSV4_TOPK_SELECT": "triton",
        }

    def test_choices_end_with_the_context(self, monkeypatch):
        monkeypatch.setenv("DSV4_MOE", "reference")
        with gate.selected({"DSV4_SHARED_EXPERT": "reference"}):
            assert "DSV4_MOE" not in os.environ and os.environ["DSV4_SHARED_EXPERT"] == "reference"
        assert os.environ["DSV4_MOE"] == "reference" and "DSV4_SHARED_EXPERT" not in os.environ

    def test_what_cannot_run_here_is_told_before(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if torch.cuda.is_available():
            pytest.skip("triton runs here")
        with pytest.raises(
            SelectionError, match="DSV4_SPARSE_MLA=triton cannot run here: there is no GPU"
        ):
            with gate.selected({"DSV4_SPARSE_MLA": "triton"}):
                pass
        assert (
            "DSV4_SPARSE_MLA" not in os.environ
            and OPERATORS["sparse_mla"]._forced.value == flags.AUTO
        )


@pytest.fixture
def evaluate(capsys):
    """Runs `dsv4 eval`; returns its status and what it printed."""

    def run(*words):
        status = main(["eval", *map(str, words)])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


class TestCommand:
    def test_random_weights_are_below_the_margins(self, evaluate, random_dir, tmp_path):
        status, said = evaluate("--tiny", random_dir, "--quick", "--json", tmp_path / "gate.json")
        written = json.loads((tmp_path / "gate.json").read_text())
        assert status == 1 and not written["passed"]
        assert [each["setting"] for each in written["settings"]] == [
            "exact, references",
            "official",
            "serving",
        ]
        for each in written["settings"]:
            rows = {row["measure"]: row for row in each["rows"]}
            assert not rows["recall, window"]["passed"] and not rows["recall, 300"]["passed"]
            assert each["ran"]["sparse_mla"] == ["reference"]
            assert rows["loss, nats per token"]["count"] == QUICK.windows * QUICK.window
        # Serving and exact differ by roundings, not by a nat.
        assert abs(rows["loss above exact"]["value"]) < 0.1
        assert "BELOW" in said and "recall, window is 0.0000, margin 0.9500" in said

    def test_one_precision_as_json(self, evaluate, random_dir):
        status, said = evaluate("--tiny", random_dir, "--quick", "--precision", "exact", "--json")
        assert status == 1 and [each["setting"] for each in json.loads(said)["settings"]] == [
            "exact, references"
        ]

    @pytest.mark.parametrize(
        "words, complaint",
        [
            ([], "give either the URL of a server or --tiny"),
            (["http://127.0.0.1:9", "--tiny"], "not both"),
            (["--tiny", "/nowhere/at/all"], "/nowhere/at/all is no directory"),
            (["--tiny", ".", "--gsm8k"], "--gsm8k belongs to a server's URL"),
            (["--tiny", ".", "--recall", "1k"], "--recall belongs to a server's URL"),
            (["http://127.0.0.1:9", "--needle", "100", "--quick"], "--quick belongs to --tiny"),
            (["--tiny", ".", "--profile", "saef"], "DSV4_PROFILE='saef' is not a value"),
            (["--tiny", ".", "--operators", "sparse_mlaa=triton"], "did you mean sparse_mla?"),
            (["--tiny", ".", "--operators", "sparse_mla"], "write OPERATOR=IMPLEMENTATION"),
            (
                ["--tiny", ".", "--operators", "sparse_mla=cuda", "--operators", "route=reference"],
                "DSV4_SPARSE_MLA='cuda' is not a value",
            ),
            (
                ["--tiny", ".", "--operators", "sparse_mla=cuda"],
                "DSV4_SPARSE_MLA='cuda' is not a value",
            ),
            (["--tiny", "."], "config.json does not exist"),
        ],
    )
    def test_wrong_input(self, evaluate, tmp_path, monkeypatch, words, complaint):
        monkeypatch.chdir(tmp_path)
        status, said = evaluate(*words)
        assert status == 2 and complaint in said and said.count("dsv4: error") == 1

    def test_no_shipped_checkpoint(self, evaluate, tmp_path, monkeypatch):
        monkeypatch.setattr(gate, "checkpoint_directory", lambda: tmp_path / "absent")
        status, said = evaluate("--tiny")
        assert (
            status == 2
            and "the trained checkpoint of this package is not there" in said
            and "--tiny DIR" in said
        )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_changes_the_reference_and_ends(random_dir, engine, eval_set, fault):
    """Faults that change nothing would prove nothing; one that stayed would spoil the next test."""
    ids = list(eval_set.windows[0][:-1])
    before = engine.score(ids)
    with fault():
        faulty = gate.load_engine(random_dir, Precision.EXACT, "cpu", eval_set.longest).score(ids)
    assert faulty.isfinite().all()
    # Far above fp32 rounding of logits near 2.
    assert (faulty - before).abs().max() > 1e-3
    assert torch.equal(engine.score(ids), before)
