"""Needle retrieval: a number is told once at some depth of a long text and asked for at its end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .score import EvalError, Score

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle lies, as a share of the text before it."""
_PROBE = 100
"""Sentences of the prompt that tells how many tokens a sentence has."""
_WHO = (
    "the baker",
    "a sailor",
    "the old clerk",
    "my neighbour",
    "a young painter",
    "the gardener",
    "the night guard",
    "a teacher",
)
_DID = ("repaired", "carried", "forgot", "sold", "painted", "counted", "borrowed", "measured")
_WHAT = (
    "a wooden ladder",
    "two copper kettles",
    "the blue bicycle",
    "a box of candles",
    "the broken clock",
    "seven letters",
    "a heavy rope",
)
_WHEN = (
    "before sunrise",
    "in the market hall",
    "after the rain",
    "near the bridge",
    "on a quiet Sunday",
    "during the long winter",
)
_COLOURS = ("amber", "crimson", "ivory", "teal", "violet", "silver", "olive", "scarlet")
_BEASTS = ("heron", "badger", "otter", "falcon", "lynx", "turtle", "beaver", "raven")


@dataclass(frozen=True)
class Answer:
    """What a server replied, and how many tokens it counted in the prompt."""

    text: str
    prompt_tokens: int


@dataclass(frozen=True)
class Case:
    """One needle."""

    length: int
    depth: float
    number: int
    subject: str

    @property
    def name(self) -> str:
        return f"{self.length} tokens, depth {self.depth:g}, {self.subject}"


def cases(lengths: Iterable[int], each: int, seed: int) -> list[Case]:
    """`each` needles for every length and depth; the same seed gives the same needles."""
    draw = random.Random(seed)
    # Two needles of one place have different subjects, so that every item has a name of its own.
    subjects = [f"{colour} {beast}" for colour in _COLOURS for beast in _BEASTS]
    return [
        Case(length, depth, draw.randrange(10_000, 100_000), subject)
        for length in lengths
        for depth in DEPTHS
        for subject in draw.sample(subjects, each)
    ]


def prompt(case: Case, sentences: int) -> str:
    """The text of `sentences` sentences with the needle at its depth, and the question."""
    draw = random.Random(f"{case.number} {case.depth}")
    parts = _WHO, _DID, _WHAT, _WHEN
    text = [
        f"{' '.join(draw.choice(part) for part in parts)}.".capitalize() for _ in range(sentences)
    ]
    text.insert(round(case.depth * sentences), f"The code of the {case.subject} is {case.number}.")
    return (
        f"{' '.join(text)}\n\nWhat is the code of the {case.subject}? Answer with the number alone."
    )


def evaluate(
    ask: Callable[[str], Answer],
    lengths: Sequence[int],
    each: int = 1,
    seed: int = 0,
    progress: Callable[[Case, Answer, bool], None] = lambda case, answer, found: None,
) -> Score:
    """Score over all lengths and depths; lengths are in tokens of the server, of which a prompt
    misses at most a few.

    `ask` sends a prompt and returns the answer. Raises EvalError when a length leaves no room for a
    text.
    """
    made = cases(lengths, each, seed)
    short, long = (ask(prompt(made[0], count)).prompt_tokens for count in (0, _PROBE))
    per_sentence = (long - short) / _PROBE
    items = {}
    for case in made:
        sentences = int((case.length - short) / per_sentence)
        if sentences < 1:
            raise EvalError(f"--needle {case.length}: the question alone has {short} tokens")
        answer = ask(prompt(case, sentences))
        items[case.name] = float(str(case.number) in answer.text)
        progress(case, answer, bool(items[case.name]))
    return Score(
        f"needle {','.join(map(str, lengths))}", f"exact number, {each} a place, seed {seed}", items
    )


def asker(url: str, model: str, chat: bool, max_tokens: int) -> Callable[[str], Answer]:
    """A function that asks the OpenAI-compatible server at `url`, greedily. It raises EvalError
    when the server refuses."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=url.rstrip("/") + "/v1", api_key="none", timeout=3600, max_retries=1)

    def ask(text: str) -> Answer:
        try:
            if chat:
                reply = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": text}],
                    temperature=0,
                    max_tokens=max_tokens,
                )
                said = reply.choices[0].message.content or ""
            else:
                reply = client.completions.create(
                    model=model, prompt=text, temperature=0, max_tokens=max_tokens
                )
                said = reply.choices[0].text
        except OpenAIError as error:
            raise EvalError(f"{url} refuses a prompt of {len(text)} characters: {error}") from None
        return Answer(said, reply.usage.prompt_tokens)

    return ask
