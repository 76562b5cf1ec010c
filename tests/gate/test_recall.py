"""Documents with facts: what was told, what is asked, and how far apart they are."""

from __future__ import annotations

import re

import pytest

from dsv4_plugin.accuracy.recall import (
    DISTRACTORS,
    FACTS,
    NAMES,
    THINGS,
    cue,
    document,
    fact,
    question,
    said,
)
from dsv4_plugin.accuracy.score import EvalError


def words(text: str) -> int:
    """Tokens of a tokenizer whose tokens are words and punctuation."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("distance", [64, 300, 1024, 2048])
def test_distance_is_that_of_the_text(text, distance):
    """Counted from the text alone: tokens since the name's sentence was last told."""
    made = document(text, words, distance)
    assert len(made.trials) == FACTS
    for trial in made.trials:
        prompt = made.prompt(trial)
        assert prompt.endswith(cue(trial.name)) and made.text[trial.start :].startswith(
            f" {trial.thing}."
        )
        # From before the thing to before the thing: the trial's own cue of two words is between.
        told = prompt.rindex(f"{cue(trial.name)} {trial.thing}.") + len(cue(trial.name))
        assert words(prompt[told:]) == trial.distance
    mean = sum(trial.distance for trial in made.trials) / FACTS
    # The filler may miss its length by a word.
    assert abs(mean - distance) <= 3
    assert max(trial.distance for trial in made.trials) <= 1.5 * distance


def test_the_window_holds_its_facts(text):
    assert all(
        seed_trial.distance < 100
        for seed in range(20)
        for seed_trial in document(text, words, 64, seed=seed).trials
    )


def test_every_fact_is_told_once_and_asked_once(text):
    made = document(text, words, 1024)
    told = re.findall(r" (\w+) likes (\w+)\.", made.text)
    names = [name for name, _ in told]
    asked = {(trial.name, trial.thing) for trial in made.trials}
    assert len(told) == 2 * FACTS + DISTRACTORS
    assert all(told.count(pair) == 2 for pair in asked)
    others = [pair for pair in told if pair not in asked]
    assert len(others) == len(set(others)) == DISTRACTORS
    assert len(set(names)) == len({thing for _, thing in told}) == FACTS + DISTRACTORS
    assert set(names) <= set(NAMES) and {thing for _, thing in told} <= set(THINGS)


def test_cues_come_in_another_order_than_facts(text):
    trials = document(text, words, 1024).trials
    assert [trial.told for trial in trials] != sorted(trial.told for trial in trials)


def test_the_seed_decides(text):
    assert document(text, words, 512, seed=1) == document(text, words, 512, seed=1)
    assert document(text, words, 512, seed=1) != document(text, words, 512, seed=2)


def test_items_do_not_depend_on_the_tokenizer(text):
    """Else two servers with different tokenizers could not be compared item by item."""
    pairs = [
        {(trial.name, trial.thing) for trial in document(text, count, 1024).trials}
        for count in (words, lambda part: 0.3 * len(part))
    ]
    assert pairs[0] == pairs[1]


def test_chat_asks_after_the_text(text):
    made = document(text, words, 64)
    for trial in made.trials:
        chat = made.chat(trial)
        assert chat.endswith(f"\n{question(trial.name)}")
        # Told, and not yet asked by its cue.
        assert chat.count(fact(trial.name, trial.thing)) == chat.count(cue(trial.name)) == 1


@pytest.mark.parametrize(
    "answer, thing",
    [
        (" chess. Bert", "chess"),
        ("I remember that Alma likes tea.", "tea"),
        ("Chess!", "chess"),
        (" nothing", None),
        ("", None),
        (" teapots and rain", "rain"),
    ],
)
def test_what_an_answer_names(answer, thing):
    assert said(answer) == thing


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"distance": 10}, "a distance of 10 tokens has no room for a fact"),
        ({"distance": 100, "facts": 60}, "at most 64 in all"),
        ({"distance": 100, "facts": 0}, "0 facts"),
        ({"distance": 100, "text": "too short"}, "has 9 characters"),
    ],
)
def test_wrong_input(text, options, complaint):
    with pytest.raises(EvalError, match=complaint):
        document(**{"text": text, "tokens": words} | options)
