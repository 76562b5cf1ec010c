"""Evaluation against real HTTP servers whose right and wrong answers are known beforehand."""

import json
import math
import random
import re
import sys
from pathlib import Path

import pytest

# for `answering_server`: pytest's importlib mode adds no directory
sys.path.insert(0, str(Path(__file__).parent))
from answering_server import answering, finds_needles  # noqa: E402

from dsv4_plugin.accuracy import gate  # noqa: E402
from dsv4_plugin.accuracy.needle import DEPTHS, cases, prompt  # noqa: E402
from dsv4_plugin.accuracy.score import EvalError, Score, difference  # noqa: E402
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
            assert (
                evaluate(url, "--gsm8k", SUMS, "--metric", "flexible-extract")[2]["scores"][0][
                    "score"
                ]
                == 1
            )

    def test_a_server_that_refuses_is_no_score(self, evaluate):
        """Were lost requests counted as wrong answers, a server too small would look like a bad
        model."""
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
            status, said, written = evaluate(
                url, "--needle", "300,1k", "--needles", 2, "--needle-threshold", 1
            )
        assert status == 0 and said.count("found") == 2 * 2 * len(DEPTHS)
        assert written["scores"][0]["score"] == 1

    def test_a_server_that_sees_only_the_end(self, evaluate):
        """It keeps the last fifth of each text, so it misses the four needles that are not at the
        end."""
        with answering(lambda text: finds_needles(text[-max(len(text) // 5, 150) :])) as url:
            status, said, written = evaluate(url, "--needle", "1000", "--needle-threshold", 1)
        assert status == 1 and said.count("MISSED") == 4
        assert written["scores"][0]["score"] == 1 / 5

    def test_lengths_are_the_servers_tokens(self, evaluate):
        seen = []
        with answering(lambda text: seen.append(len(text.split())) or finds_needles(text)) as url:
            evaluate(url, "--needle", "2000")
        # The needle is between whole sentences, so a prompt may miss its length by a sentence or
        # two of at most ten words.
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
            # one of a hundred sentences, and the question at the end
            assert abs(place - case.depth) < 0.05


def remembers(text):
    """Goes on with a cue, or answers the question of a chat, as the text says; "tea" when it does
    not say."""
    name = re.search(r"What does (\w+) like\?$| (\w+) likes$", text)
    if name is None:
        return ""
    told = re.search(rf" {name.group(1) or name.group(2)} likes (\w+)\.", text)
    return f" {told.group(1)}. And so on" if told else " tea."


@pytest.fixture
def filler(tmp_path, monkeypatch):
    """The text between facts, as the shipped checkpoint would bring it."""
    draw = random.Random(0)
    (tmp_path / "held_out.txt").write_text(
        " ".join(
            draw.choice(("wind", "harbour", "autumn", "copper", "lantern")) for _ in range(4000)
        )
    )
    monkeypatch.setattr(gate, "checkpoint_directory", lambda: tmp_path)


@pytest.mark.usefixtures("filler")
class TestRecall:
    @pytest.mark.parametrize("api", [[], ["--api", "chat"]])
    def test_a_server_that_remembers(self, evaluate, api):
        with answering(remembers) as url:
            status, said, written = evaluate(
                url, "--recall", "100,1k", "--recall-threshold", 1, *api
            )
        assert status == 0 and said.count(": right") == 2 * 24
        assert [(score["task"], score["score"], score["count"]) for score in written["scores"]] == [
            ("recall 100", 1, 24),
            ("recall 1024", 1, 24),
        ]

    def test_a_server_that_sees_only_the_end(self, evaluate):
        """It keeps the last 400 words: what was told 100 words before, but nothing from 1000."""
        with answering(lambda text: remembers(" " + " ".join(text.split()[-400:]))) as url:
            status, said, written = evaluate(url, "--recall", "100,1000", "--recall-threshold", 0.9)
        near, far = written["scores"]
        assert status == 1 and near["score"] == 1 and "BELOW" in said
        # It says tea, which may be what one fact of 24 told.
        assert far["score"] <= 1 / 24

    def test_lengths_are_the_servers_tokens(self, evaluate):
        """A word has some six characters here; the first guess of a length is mended by what the
        server counts."""
        seen = []
        with answering(
            lambda text: (
                seen.append(len(text.split())) or remembers(text) if text.endswith("likes") else ""
            )
        ) as url:
            _, said, _ = evaluate(url, "--recall", "2000")
        # Half of the facts and half of the cues lie outside of the mean distance; a fact has three
        # words, a gap at most six.
        assert all(2000 - 40 <= length <= 2000 + 24 * 9 for length in seen[-24:])
        distances = [int(each) for each in re.findall(r"told (\d+) tokens before", said)]
        assert abs(sum(distances) / len(distances) - 2000) <= 40

    def test_two_servers_item_by_item(self, evaluate):
        def forgets(text):
            """The names whose letters come first."""
            return " nothing." if re.search(r" [A-H]\w+ likes$", text) else remembers(text)

        with answering(remembers) as good, answering(forgets) as bad:
            status, said, written = evaluate(bad, "--recall", "300", "--against", good)
        assert status == 1 and "recall 300 against" in said and "WORSE" in said
        lost = [item for item, value in written["scores"][0]["items"].items() if not value]
        assert lost and all(item[0] in "ABCDEFGH" for item in lost)
        assert written["differences"][0]["worse"] == len(lost)

    def test_no_text(self, evaluate, tmp_path):
        (tmp_path / "held_out.txt").unlink()
        with answering(remembers) as url:
            status, said, written = evaluate(url, "--recall", "300")
        assert status == 2 and "held_out.txt does not exist" in said and written is None


class TestDifference:
    def test_paired(self):
        """Of six items one was lost and one gained: the mean is 0 and its error that of (1, -1, 0,
        0, 0, 0)."""
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
        assert (
            written["differences"][0]["mean"] == -6 / 8 and written["differences"][0]["worse"] == 6
        )

    def test_an_earlier_result(self, evaluate, tmp_path):
        with answering(knows()) as url:
            evaluate(url, "--gsm8k", SUMS)
        earlier = (tmp_path / "scores.json").rename(tmp_path / "earlier.json")
        with answering(knows(2)) as url:
            status, said, _ = evaluate(url, "--gsm8k", SUMS, "--against", earlier)
        # One of eight is lost: 0.125 with a standard error of 0.125, which is no more than two of
        # them.
        assert status == 0 and "-0.1250 ± 0.1250" in said


@pytest.mark.parametrize(
    "words, complaint",
    [
        (
            ["http://127.0.0.1:9", "--needle", "100"],
            "no server answers at http://127.0.0.1:9/v1/models",
        ),
        (["127.0.0.1:30000", "--needle", "100"], "is no address of a server"),
        (["http://127.0.0.1:9"], "nothing to evaluate"),
        (["http://127.0.0.1:9", "--recipe", "cpu-tiny"], "names no task (none: random weights)"),
    ],
)
def test_wrong_input(evaluate, words, complaint):
    status, said, written = evaluate(*words)
    assert status == 2 and complaint in said and written is None
