"""Batches to learn from: running text with facts in between, stated once, and stated again near and
far."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dsv4_plugin.accuracy.recall import NAMES, THINGS, cue, fact, question

UNPREDICTABLE, ORDINARY, RECALLED = 0.0, 1.0, 4.0
"""Weights of a token's loss: what nothing tells, text, and the thing of a fact that was stated
before."""


@dataclass
class Recall:
    """The token that predicts a thing stated before, and where it was stated."""

    row: int
    """Of the batch."""
    at: int
    """Position of the last token of the cue; the thing follows."""
    spans: list[tuple[int, int]]
    """First and last position of each earlier statement, from name to thing."""

    @property
    def distance(self) -> int:
        """Tokens since the thing was last read."""
        return self.at + 1 - self.spans[-1][1]


@dataclass
class Batch:
    tokens: Tensor
    """int64 [B, T]"""
    weights: Tensor
    """fp32 [B, T]: of the loss of the *next* token; 0 at the last."""
    recalls: list[Recall]


class Lessons:
    """Draws batches; a `random.Random` makes them repeatable."""

    def __init__(self, tokenizer: Tokenizer, text: str):
        self.encode = lambda string: tokenizer.encode(string, add_special_tokens=False).ids
        self.text = self.encode(text)
        self.bos, self.eos, self.user, self.assistant, self.no_thinking = map(
            tokenizer.token_to_id,
            (
                "<｜begin▁of▁sentence｜>",
                "<｜end▁of▁sentence｜>",
                "<｜User｜>",
                "<｜Assistant｜>",
                "</think>",
            ),
        )
        self.facts = {
            (name, thing): self.encode(fact(name, thing)) for name in NAMES for thing in THINGS
        }
        if (
            any(len(ids) != 4 for ids in self.facts.values())
            or len(self.encode(cue(NAMES[0]))) != 2
        ):
            raise ValueError("a name, 'likes', a thing and the full stop must be one token each")
        self.questions = {name: self.encode("\n" + question(name)) for name in NAMES}
        self.opening = self.encode("I remember that")

    def batch(
        self, rng: random.Random, size: int, length: int, gaps: Sequence[int], plain: float = 0.15
    ) -> Batch:
        """`size` documents of `length` tokens; a share of `plain` is text alone. `gaps` are mean
        lengths of text between facts."""
        rows, weights, recalls = [], [], []
        for row in range(size):
            document = _Document(self, rng, row)
            if rng.random() < plain:
                document.read(length)
            else:
                document.facts_and_text(length, rng.choice(gaps))
            rows.append(document.tokens[:length])
            weights.append([*document.weights[1:length], UNPREDICTABLE])
            recalls += [each for each in document.recalls if each.at + 1 < length]
        return Batch(torch.tensor(rows), torch.tensor(weights), recalls)


class _Document:
    """One sequence in the making."""

    def __init__(self, lessons: Lessons, rng: random.Random, row: int):
        self.lessons, self.rng, self.row = lessons, rng, row
        self.tokens, self.weights = [lessons.bos], [UNPREDICTABLE]
        self.recalls: list[Recall] = []
        self.spans: dict[str, list[tuple[int, int]]] = {}
        self.things: dict[str, str] = {}
        self.place = rng.randrange(len(lessons.text))

    def add(self, ids: list[int], weight: float = ORDINARY) -> None:
        self.tokens += ids
        self.weights += [weight] * len(ids)

    def read(self, count: int) -> None:
        """`count` more tokens of the running text."""
        text = self.lessons.text
        if self.place + count > len(text):
            self.place = self.rng.randrange(len(text) - count)
        self.add(text[self.place : self.place + count])
        self.place += count

    def state(self, name: str) -> None:
        """A fact about `name`: a thing drawn at random the first time, the same thing from then
        on."""
        known = name in self.things
        thing = self.things.setdefault(name, self.rng.choice(THINGS))
        ids, start = self.lessons.facts[name, thing], len(self.tokens)
        if known:
            self.recalls.append(Recall(self.row, start + 1, list(self.spans[name])))
        self.tokens += ids
        self.weights += [UNPREDICTABLE, ORDINARY, RECALLED if known else UNPREDICTABLE, ORDINARY]
        self.spans.setdefault(name, []).append((start, start + 2))

    def ask(self, name: str) -> None:
        """A turn of a chat about a fact already stated; the answer names it."""
        lessons = self.lessons
        self.add(lessons.questions[name], UNPREDICTABLE)
        self.add([lessons.assistant, lessons.no_thinking], UNPREDICTABLE)
        self.add(lessons.opening)
        self.state(name)
        self.weights[-4] = ORDINARY  # the question says the name
        self.add([lessons.eos, lessons.user])
        self.weights[-1] = UNPREDICTABLE

    def facts_and_text(self, length: int, gap: int) -> None:
        rng = self.rng
        names = rng.sample(
            NAMES, min(len(NAMES), max(2, length // (gap + 4) // rng.choice((2, 3, 4))))
        )
        chat = rng.random() < 0.4
        if chat:
            self.add([self.lessons.user], UNPREDICTABLE)
        talk_from = length * rng.uniform(0.5, 0.95) if chat else length
        fresh = iter(names)
        while len(self.tokens) < length:
            if self.things and len(self.tokens) >= talk_from:
                self.ask(self._known())
                continue
            self.read(min(int(rng.expovariate(1 / gap)), length))
            name = next(fresh, None) if not self.things or rng.random() < 0.5 else self._known()
            self.state(name or self._known())

    def _known(self) -> str:
        """A name already stated: any, or the one not heard of for longest."""
        if self.rng.random() < 0.3:
            return min(self.things, key=lambda name: self.spans[name][-1])
        return self.rng.choice(list(self.things))
