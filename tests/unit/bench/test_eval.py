"""Evaluation against real HTTP servers whose right and wrong answers are known beforehand."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `answering_server`: pytest's importlib mode adds no directory
from answering_server import answering, finds_needles  # noqa: E402

from dsv4_plugin.bench.accuracy import EvalError, Score, difference  # noqa: E402
from dsv4_plugin.bench.needle import DEPTHS, cases, prompt  # noqa: E402
from dsv4_plugin.cli import main  # noqa: E402

SUMS = Path(__file__).parent / "data" / "sums"
"""Eight questions and six examples of our own, in GSM8K's files."""


def knows(*wrong: int, form: str = "So it is\n#### {}"):
    """Answers the questions of SUMS, all but those numbered `wrong`."""
    rows = [json.loads(line) for line in (SUMS / "test.jsonl").read_text().splitlines()]

    def reply(text):
        [index] = [index for index, row in enumerate(rows) if row["question"] in text]
        return form.format("7" if index in wrong else rows[index]["answer"].rpartition("#### ")[2])
    return reply


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Runs `dsv4 eval`; returns its status, what it printed, and what it wrote."""
    def run(*words):
        out = tmp_path / "scores.json"
        status = main(["eval", *map(str, words), "--out", str(out)])
        said = capsys.readouterr()
        return status, said.out + said.err, json.loads(out.read_text()) if out.exists() else None
    return run


class TestGsm8k:
    @pytest.mark.parametrize("api", ["chat", "completions"])
    def test_score_and_standard_error(self, evaluate, api):
        with answering(knows(0, 5)) as url:
            status, said, written = evaluate(url, "--gsm8k", SUMS, "--api", api)
        [score] = written["scores"]
        assert status == 0 and "0.7500" in said and "no threshold" in said
        assert score["score"] == 6 / 8 and score["count"] == 8
        # Of a share p of n items the standard error is sqrt(p(1-p)/(n-1)).
        assert score["stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 7))
        assert [item for item, value in score["items"].items() if not value] == ["0", "5"]

    @pytest.mark.parametrize("threshold, status", [(0.75, 0), (0.76, 1)])
    def test_below_the_threshold_is_a_failure(self, evaluate, threshold, status):
        with answering(knows(0, 5)) as url:
            assert evaluate(url, "--gsm8k", SUMS, "--threshold", threshold)[0] == status

    def test_the_recipe_gives_the_threshold(self, evaluate):
        with answering(knows(3)) as url:
            status, said, _ = evaluate(url, "--gsm8k", SUMS, "--recipe", "mi355x-pro-tp8-latency")
        assert status == 1 and "threshold 0.91: BELOW" in said

    def test_metrics(self, evaluate):
        with answering(knows(form="It is {}.")) as url:
            assert evaluate(url, "--gsm8k", SUMS)[2]["scores"][0]["score"] == 0
            assert evaluate(url, "--gsm8k", SUMS, "--metric", "flexible-extract")[2]["scores"][0]["score"] == 1

    def test_a_server_that_refuses_is_no_score(self, evaluate):
        """Were lost requests counted as wrong answers, a server too small would look like a bad model."""
        with answering(knows(), context=10) as url:
            status, said, written = evaluate(url, "--gsm8k", SUMS)
        assert status == 2 and "lm-eval could not evaluate" in said and written is None

    def test_missing_data(self, evaluate, tmp_path):
        with answering(knows()) as url:
            status, said, written = evaluate(url, "--gsm8k", tmp_path)
        assert status == 2 and "train.jsonl" in said and written is None


class TestNeedle:
    def test_found_at_every_depth(self, evaluate):
        with answering(finds_needles) as url:
            status, said, written = evaluate(url, "--needle", "300,1k", "--needles", 2, "--needle-threshold", 1)
        assert status == 0 and said.count("found") == 2 * 2 * len(DEPTHS)
        assert written["scores"][0]["score"] == 1

    def test_a_server_that_sees_only_the_end(self, evaluate):
        """It keeps the last fifth of each text, so it misses the four needles that are not at the end."""
        with answering(lambda text: finds_needles(text[-max(len(text) // 5, 150):])) as url:
            status, said, written = evaluate(url, "--needle", "1000", "--needle-threshold", 1)
        assert status == 1 and said.count("MISSED") == 4
        assert written["scores"][0]["score"] == 1 / 5

    def test_lengths_are_the_servers_tokens(self, evaluate):
        seen = []
        with answering(lambda text: seen.append(len(text.split())) or finds_needles(text)) as url:
            evaluate(url, "--needle", "2000")
        # The needle is between whole sentences, so a prompt may miss its length by a sentence or two of at most ten words.
        assert len(seen[2:]) == len(DEPTHS) and all(abs(length - 2000) <= 60 for length in seen[2:])

    def test_a_length_that_the_server_refuses(self, evaluate):
        with answering(finds_needles, context=1500) as url:
            status, said, _ = evaluate(url, "--needle", "2000")
        assert status == 2 and "longer than 1500 tokens" in said

    def test_prompts_repeat_and_differ(self):
        first, again = cases([1000], 2, seed=3), cases([1000], 2, seed=3)
        assert first == again and len({case.name for case in first}) == len(first)
        assert cases([1000], 2, seed=4) != first
        assert prompt(first[0], 50) == prompt(again[0], 50)
        for case in first:
            text = prompt(case, 100)
            assert text.count(str(case.number)) == 1
            place = text.index(str(case.number)) / len(text)
            assert abs(place - case.depth) < 0.05  # one of a hundred sentences, and the question at the end


class TestDifference:
    def test_paired(self):
        """Of six items one was lost and one gained: the mean is 0 and its error that of (1, -1, 0, 0, 0, 0)."""
        first = Score("t", "m", dict(zip("abcdef", (1, 1, 1, 0, 0, 1))))
        second = Score("t", "m", dict(zip("abcdef", (1, 1, 0, 1, 0, 1))))
        found = difference(first, second)
        assert (found.mean, found.better, found.worse) == (0, 1, 1)
        assert found.stderr == pytest.approx(math.sqrt((2 / 5) / 6))
        assert not found.significant(2)

    def test_other_questions_cannot_be_compared(self):
        with pytest.raises(EvalError, match="not the same questions"):
            difference(Score("t", "m", {"a": 1}), Score("t", "m", {"b": 1}))

    def test_two_servers(self, evaluate):
        with answering(knows()) as good, answering(knows(0, 1, 2, 3, 4, 5)) as bad:
            assert evaluate(good, "--gsm8k", SUMS, "--against", bad)[0] == 0
            status, said, written = evaluate(bad, "--gsm8k", SUMS, "--against", good)
        assert status == 1 and "WORSE" in said
        assert written["differences"][0]["mean"] == -6 / 8 and written["differences"][0]["worse"] == 6

    def test_an_earlier_result(self, evaluate, tmp_path):
        with answering(knows()) as url:
            evaluate(url, "--gsm8k", SUMS)
        earlier = (tmp_path / "scores.json").rename(tmp_path / "earlier.json")
        with answering(knows(2)) as url:
            status, said, _ = evaluate(url, "--gsm8k", SUMS, "--against", earlier)
        # One of eight is lost: 0.125 with a standard error of 0.125, which is no more than two of them.
        assert status == 0 and "-0.1250 ± 0.1250" in said


@pytest.mark.parametrize("words, complaint", [
    (["http://127.0.0.1:9", "--needle", "100"], "no server answers at http://127.0.0.1:9/v1/models"),
    (["127.0.0.1:30000", "--needle", "100"], "is no address of a server"),
    (["http://127.0.0.1:9"], "nothing to evaluate"),
    (["http://127.0.0.1:9", "--recipe", "cpu-tiny"], "names no task (none: random weights)"),
])
def test_wrong_input(evaluate, words, complaint):
    status, said, written = evaluate(*words)
    assert status == 2 and complaint in said and written is None
