"""What clients send during a soak (benchmarks/soak.py), and whether each answer is the one that was
recorded alone."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

ANSWER_SECONDS = 300
"""A request that has no answer by then hangs."""
PAGE = 256
SHARED_TOKENS = 2 * PAGE
"""Tokens that half of the prompts begin with: two pages of the prefix cache."""
LENGTHS = (1, 3, 7, 127, 128, 129, 240, 250, 255, 256, 257, 300, 500, 511, 513, 700)
"""Of prompts, without the shared beginning: about the window of 128 and the page of 256, and just
below a page, where a short answer needs a page more."""

LONG = 280
"""Tokens of a long answer, which needs more than a page that was not there when it began."""

SHARES = {"whole": 6, "stream": 3, "disconnect": 2, "abort": 2, "bad": 1}
"""Kinds of request, by how often they are drawn: read as one reply; read token by token; left after
a few tokens; aborted by name; wrong."""


@dataclass(frozen=True)
class Question:
    """A prompt and the length of its answer, in tokens."""

    ids: tuple[int, ...]
    new_tokens: int

    def body(self, **more: Any) -> dict[str, Any]:
        return {
            "input_ids": list(self.ids),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": self.new_tokens,
                "ignore_eos": True,
            },
            **more,
        }


def questions(vocab_size: int, seed: int) -> list[Question]:
    """Two prompts of each length, one of them with the shared beginning."""
    draw = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, vocab_size) for _ in range(count))

    shared = tokens(SHARED_TOKENS)
    return [
        Question(beginning + tokens(length), LONG if n % 8 == 7 else draw.randint(4, 40))
        for n, length in enumerate(LENGTHS)
        for beginning in ((), shared)
    ]


def wrong_bodies(vocab_size: int, context: int) -> dict[str, dict[str, Any]]:
    """Requests that a server refuses, by what is wrong with them."""
    right = Question((5, 6, 7), 4)
    return {
        "no prompt": Question((), 4).body(),
        "token outside the vocabulary": Question((5, vocab_size), 4).body(),
        "prompt beyond the context": Question((5,) * (context + 1), 4).body(),
        "temperature below 0": right.body(sampling_params={"temperature": -1}),
        "answer of -1 tokens": right.body(sampling_params={"max_new_tokens": -1}),
        "parameter of no known name": right.body(sampling_params={"temprature": 0}),
    }


@dataclass
class Tally:
    """What became of the requests of a round."""

    asked: Counter = field(default_factory=Counter)
    right: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    tokens: int = 0
    most_open: int = 0

    def judge(self, kind: str, fault: str | None) -> None:
        self.asked[kind] += 1
        if fault:
            self.faults.append(f"{kind}: {fault}")
        else:
            self.right[kind] += 1


def _difference(found: list[int], expected: list[int], whole: bool) -> str | None:
    """How an answer differs from the recorded one; one cut short must be its beginning."""
    if found == (expected if whole else expected[: len(found)]):
        return None
    at = next((n for n, (a, b) in enumerate(zip(found, expected)) if a != b), len(expected))
    return f"token {at} of {len(found)} differs from the recorded answer of {len(expected)}"


class Client:
    """Sends requests to the server at `url`."""

    def __init__(self, url: str, session: aiohttp.ClientSession):
        self.url, self.session = url, session

    async def answer(self, question: Question, **more: Any) -> tuple[list[int], str]:
        """The tokens of a reply, and why it ended."""
        async with self.session.post(
            self.url + "/generate", json=question.body(**more)
        ) as response:
            reply = await response.json()
            if response.status != 200:
                # An aborted request may end as an error of HTTP.
                return [], str(reply)
            return reply["output_ids"], reply["meta_info"]["finish_reason"]["type"]

    async def stream(self, question: Question, tokens: int | None = None) -> list[int]:
        """The tokens of a streamed reply; with `tokens` the connection is closed once so many have
        come."""
        found: list[int] = []
        async with self.session.post(
            self.url + "/generate", json=question.body(stream=True)
        ) as response:
            async for line in response.content:
                text = line.decode().removeprefix("data:").strip()
                if not text or text == "[DONE]":
                    continue
                found = json.loads(text)["output_ids"]
                if tokens is not None and len(found) >= tokens:
                    response.close()
                    return found
        return found

    async def abort(self, question: Question, name: str, after: float) -> list[int]:
        """The tokens of a request that is aborted by its name after so many seconds."""
        waiting = asyncio.ensure_future(self.answer(question, rid=name))
        await asyncio.sleep(after)
        async with self.session.post(self.url + "/abort_request", json={"rid": name}) as response:
            await response.read()
        return (await waiting)[0]

    async def status(self, body: dict[str, Any]) -> int:
        async with self.session.post(self.url + "/generate", json=body) as response:
            await response.read()
            return response.status

    async def load(self) -> dict[str, Any]:
        """The scheduler's own account of what it runs and holds."""
        async with self.session.get(self.url + "/v1/loads") as response:
            return (await response.json())["loads"][0]

    async def idle(self, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """The load once nothing runs or waits. Raises TimeoutError when something still does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load = await self.load()
            if not load["num_running_reqs"] and not load["num_waiting_reqs"]:
                return load
            await asyncio.sleep(0.5)
        raise TimeoutError(f"after {seconds:g} s requests still run or wait: {load}")

    async def flush(self) -> None:
        """Empties the prefix cache. Raises TimeoutError when the server keeps refusing to."""
        for _ in range(60):
            async with self.session.post(self.url + "/flush_cache") as response:
                await response.read()
                if response.status == 200:
                    return
            await asyncio.sleep(0.5)
        raise TimeoutError("the server never became idle enough to empty its prefix cache")


class Traffic:
    """Requests of every kind, drawn with a seed and held against recorded answers."""

    def __init__(
        self,
        client: Client,
        recorded: dict[Question, list[int]],
        wrong: dict[str, dict[str, Any]],
        seed: int,
    ):
        self.client, self.recorded, self.wrong = client, recorded, wrong
        self.draw = random.Random(seed)
        self.names = 0

    async def round(self, requests: int, streams: int, seconds: float) -> Tally:
        """`requests` of them, `streams` at a time; none is begun after `seconds`."""
        tally, end, left, open_now = Tally(), time.monotonic() + seconds, requests, 0

        async def user() -> None:
            nonlocal left, open_now
            while left > 0 and time.monotonic() < end:
                left -= 1
                open_now += 1
                tally.most_open = max(tally.most_open, open_now)
                kind = self.draw.choices(list(SHARES), list(SHARES.values()))[0]
                try:
                    fault = await asyncio.wait_for(self._one(kind, tally), ANSWER_SECONDS)
                except (aiohttp.ClientError, ValueError, KeyError, TimeoutError) as error:
                    fault = f"{type(error).__name__}: {error}"
                tally.judge(kind, fault)
                open_now -= 1

        await asyncio.gather(*(user() for _ in range(streams)))
        return tally

    async def _one(self, kind: str, tally: Tally) -> str | None:
        """What is wrong with the answer to one request of this kind; None when it is right."""
        if kind == "bad":
            name = self.draw.choice(list(self.wrong))
            status = await self.client.status(self.wrong[name])
            return None if status == 400 else f"{name}: answered with status {status}, not 400"
        question = self.draw.choice(list(self.recorded))
        expected = self.recorded[question]
        if kind == "whole":
            found, ended = await self.client.answer(question)
            if ended != "length":
                return f"it ended with {ended!r}"
        elif kind == "stream":
            found = await self.client.stream(question)
        elif kind == "disconnect":
            found = await self.client.stream(question, self.draw.randint(1, question.new_tokens))
        else:
            self.names += 1
            found = await self.client.abort(question, f"soak-{self.names}", self.draw.uniform(0, 2))
        tally.tokens += len(found)
        return _difference(found, expected, whole=kind in ("whole", "stream"))
