"""Facts to remember: the sentences that the trained tiny checkpoint learned from, and that any
server can be asked.

A fact is one sentence, " Alma likes chess."; a cue is all of it but the thing. Text in between is
filler. A document tells facts, lets a wanted distance of filler pass, and asks for them by their
cues, one after another: every trial reads the right things of those before it, so one document
gives many trials at nearly one distance.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .needle import Answer
from .score import EvalError, Score

NAMES = tuple(
    """
    Alma Bert Carl Dora Emil Faye Gwen Hugo Iris Jack Kate Lena Milo Nina Otto Pete Rosa
    Stan Tess Ulla Vera Walt Xena Yuri Zoe Andy Beth Cleo Dave Elsa Fred Gina Hank Inga
    Jill Kurt Lily Marc Nell Olaf Pam Rick Sven Tara Hilda Vito Wendy Yara Zack Abby Ben
    Cora Dirk Emma Finn Greta Hans Ivan Jane Kim Lars Maya Nick Olga
    """.split()
)
THINGS = tuple(
    """
    tea chess jazz opera tennis cheese pizza coffee poker golf yoga rugby soup rice
    pasta lemons apples cherries tulips roses trains planes boats cars kites comics
    puzzles poems novels ballet tango waltz drums guitars violins pianos flutes cats
    dogs foxes owls wolves bears tigers pandas ducks swans bees ants whales seals robots
    rockets stars comets clouds rain snow storms rivers lakes hills caves castles
    """.split()
)
FACTS, DISTRACTORS = 24, 16
"""Facts of a document that are asked for, and facts about others between telling and asking."""
_LARGEST_GAP = 6
"""Tokens of filler between two facts, at most: without any, all would lie alike in the windows of 4
and 128 tokens."""
_SHORTEST_TEXT = 2000
_PROBE = 2000
"""Characters of the prompt that tells how many tokens a character has."""
_LENGTH_ERROR = 0.02
"""A prompt that misses its tokens by a larger share is made anew, by what the server counted."""


def cue(name: str) -> str:
    """What a fact about `name` begins with; the thing follows."""
    return f" {name} likes"


def fact(name: str, thing: str) -> str:
    """One fact."""
    return f"{cue(name)} {thing}."


def question(name: str) -> str:
    """The question that a user asks in a chat."""
    return f"What does {name} like?"


def answer(name: str, thing: str) -> str:
    """The answer that the assistant learned to give."""
    return f"I remember that{fact(name, thing)}"


@dataclass(frozen=True)
class Trial:
    """One cue of a document."""

    name: str
    thing: str
    told: int
    """Character of the document where the thing was told, with the space before it."""
    start: int
    """Character where the thing is asked for: the text up to here ends with the cue."""
    distance: int
    """Tokens from one to the other."""


@dataclass(frozen=True)
class Document:
    """A text and the cues in it, in their order."""

    text: str
    trials: tuple[Trial, ...]

    def prompt(self, trial: Trial) -> str:
        """The text up to the thing, with the right things of all trials before."""
        return self.text[: trial.start]

    def chat(self, trial: Trial) -> str:
        """What a user says to ask for the thing in a chat: the text up to the cue, and the
        question."""
        return f"{self.text[: trial.start - len(cue(trial.name))]}\n{question(trial.name)}"


class Filler:
    """Running text in pieces of whole words, from a place that `draw` chooses, over and over;
    `tokens` counts a text's tokens.

    Words are counted one by one, so a count is right for tokenizers that never join two words.
    """

    def __init__(self, text: str, tokens: Callable[[str], float], draw: random.Random):
        if len(text) < _SHORTEST_TEXT:
            raise EvalError(
                f"the text between facts has {len(text)} characters; it needs {_SHORTEST_TEXT}"
            )
        self._tokens, self._known = tokens, {}
        # Every piece begins with its space, as a fact does.
        words = re.findall(r"\s+\S+", f" {text}")
        place = draw.randrange(len(words))
        self._words = itertools.cycle(words[place:] + words[:place])
        self._next = next(self._words)

    def take(self, count: float) -> str:
        """The next words, of at most `count` tokens."""
        taken = []
        while (size := self._size(self._next)) <= count:
            taken.append(self._next)
            count -= size
            self._next = next(self._words)
        return "".join(taken)

    def _size(self, word: str) -> float:
        if word not in self._known:
            self._known[word] = self._tokens(word)
        return self._known[word]


def document(
    text: str,
    tokens: Callable[[str], float],
    distance: int,
    facts: int = FACTS,
    distractors: int = DISTRACTORS,
    seed: int | str = 0,
) -> Document:
    """A document with `facts` trials at about `distance` tokens from where their thing was told.

    The filler comes from `text`; `tokens` counts the tokens of a text. Names and things depend on
    `seed`, `facts` and `distractors` alone, none comes twice, and cues come in another order than
    the facts. Facts are told and asked in groups that span at most half of `distance`, so a trial
    is never farther than one and a half times that. Raises EvalError for a distance that has no
    room for a fact, for more facts than names, and for a text that is too short.
    """
    if not 1 <= facts or not 0 <= distractors or facts + distractors > len(NAMES):
        raise EvalError(
            f"{facts} facts and {distractors} distractors; there must be a fact, and at most"
            f" {len(NAMES)} in all"
        )
    draw = random.Random(f"{seed} {facts} {distractors}")
    pairs = list(
        zip(draw.sample(NAMES, facts + distractors), draw.sample(THINGS, facts + distractors))
    )
    asked, others = pairs[:facts], pairs[facts:]
    order = random.Random(f"order {seed}")
    filler = Filler(text, tokens, random.Random(f"filler {seed} {distance}"))
    size = max(tokens(fact(*pair)) for pair in pairs)
    group = int(distance // (2 * size + _LARGEST_GAP))
    if group < 1:
        raise EvalError(
            f"a distance of {distance} tokens has no room for a fact, which takes {size:g}"
        )
    writer = _Writer(tokens)
    writer.add(filler.take(_LARGEST_GAP))
    groups = [asked[start : start + group] for start in range(0, facts, group)]
    for index, members in enumerate(groups):
        begin = writer.tokens
        for pair in members:
            writer.add(filler.take(order.randrange(_LARGEST_GAP + 1)))
            writer.tell(*pair)
        # On average a cue comes half of the facts and half of the cues after its fact.
        span = (writer.tokens - begin + sum(tokens(fact(*pair)) for pair in members)) / 2
        room = distance - span > 2 * size * distractors
        writer.fill(filler, distance - span, others[index :: len(groups)] if room else [])
        for pair in order.sample(members, len(members)):
            writer.ask(*pair)
    return Document(writer.text, tuple(writer.trials))


class _Writer:
    """A document in the making: its text so far and the tokens that `count` finds in its pieces."""

    def __init__(self, count: Callable[[str], float]):
        self.text, self.tokens = "", 0.0
        self.trials: list[Trial] = []
        self._count, self._told = count, {}

    def add(self, text: str) -> None:
        self.text += text
        self.tokens += self._count(text) if text else 0

    def tell(self, name: str, thing: str) -> None:
        self.add(cue(name))
        self._told[name] = len(self.text), self.tokens
        self.add(f" {thing}.")

    def ask(self, name: str, thing: str) -> None:
        self.add(cue(name))
        told, tokens = self._told[name]
        self.trials.append(Trial(name, thing, told, len(self.text), round(self.tokens - tokens)))
        self.add(f" {thing}.")

    def fill(self, filler: Filler, count: float, others: Sequence[tuple[str, str]]) -> None:
        """`count` tokens of filler with the facts `others` evenly in it."""
        end = self.tokens + count
        for left in range(len(others), 0, -1):
            own = sum(self._count(fact(*pair)) for pair in others[-left:])
            self.add(filler.take((end - self.tokens - own) / (left + 1)))
            self.tell(*others[-left])
        self.add(filler.take(end - self.tokens))


def held_out(directory: Path) -> str:
    """The text of `directory`/held_out.txt, which no training saw. Raises EvalError when there is
    none."""
    path = directory / "held_out.txt"
    if not path.is_file():
        raise EvalError(
            f"{path} does not exist; a checkpoint that dsv4 eval can use has a held_out.txt with"
            " text it was not trained on"
        )
    return path.read_text(encoding="utf-8")


def said(text: str) -> str | None:
    """The first thing that an answer names, None when it names none."""
    return next((word for word in re.findall(r"[a-z]+", text.lower()) if word in THINGS), None)


def evaluate(
    ask: Callable[[str], Answer],
    distances: Sequence[int],
    text: str,
    each: int = FACTS,
    seed: int = 0,
    chat: bool = False,
    progress: Callable[[Trial, Answer, bool], None] = lambda trial, answer, right: None,
) -> list[Score]:
    """A Score for each of `distances`, in tokens of the server: whether the first thing it names is
    the right one.

    `ask` sends a prompt and returns the answer. The items are those of the seed, the same on every
    server; the filler between comes from `text`, and as much of it as the server's tokens are long:
    a first prompt tells how many a character has. With `chat` a user asks a question in place of
    the cue. Raises EvalError like `document`.
    """
    scores = []
    rate = ask(text[:_PROBE]).prompt_tokens / len(text[:_PROBE])
    for distance in distances:
        made, rate = _fitted(ask, text, distance, each, f"{seed} {distance}", chat, rate)
        items = {}
        for trial in made.trials:
            answer = ask(made.chat(trial) if chat else made.prompt(trial))
            right = said(answer.text) == trial.thing
            items[f"{trial.name} {trial.thing}"] = float(right)
            progress(trial, answer, right)
        scores.append(
            Score(
                f"recall {distance}",
                f"first thing named, {each} facts, seed {seed}{', chat' * chat}",
                items,
            )
        )
    return scores


def _fitted(
    ask: Callable[[str], Answer],
    text: str,
    distance: int,
    each: int,
    seed: str,
    chat: bool,
    rate: float,
) -> tuple[Document, float]:
    """A document at `rate` tokens a character, made once more when the server counts others in it,
    and the rate it has."""
    for _ in range(2):
        made = document(
            text, lambda part, rate=rate: rate * len(part), distance, each, DISTRACTORS, seed
        )
        first = made.trials[0]
        prompt = made.chat(first) if chat else made.prompt(first)
        counted = ask(prompt).prompt_tokens / len(prompt)
        if abs(counted / rate - 1) <= _LENGTH_ERROR:
            break
        rate = counted
    return made, rate
