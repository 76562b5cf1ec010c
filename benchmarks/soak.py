"""Holds a CPU server under all that clients do, and every answer against one recorded alone.

    python benchmarks/soak.py [MODEL] [--requests 600] [--seconds 600] [--streams 64] [--rounds 3]
                              [--pool-tokens 12288] [--out FILE.json]

`exact` precision, in which an answer does not depend on what else a step holds. First each prompt
is answered alone with an empty prefix cache; then rounds of mixed traffic: shared prefixes, aborts,
clients that leave, wrong requests, more streams than the pool has pages for, so that requests are
taken back. After each round nothing may be left: no request, no page, no more memory than after the
first. At last one rank of a server of two is killed, which must end it with a message, and every
request with it.

The exit status is 1 when anything was wrong. `--seconds` bounds the traffic; recording and starting
come on top.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import aiohttp  # noqa: E402
import psutil  # noqa: E402
from soak_traffic import (  # noqa: E402
    PAGE,
    Client,
    Question,
    Traffic,
    questions,
    wrong_bodies,
)

from dsv4_plugin.bench import environment  # noqa: E402
from dsv4_plugin.bench.server import started  # noqa: E402

READY_SECONDS = 600
END_SECONDS = 60
"""Within which a server that lost a rank must have ended."""
MEMORY_SHARE = 0.10
"""By which the processes may hold more after the last round than after the first: the allocator's
arenas grow with the largest batches that meet by chance, a leak with every round."""
WINDOW_SHARE = 0.8
"""Of the pool's tokens that hold windows: a short request needs as many pages of them."""


@dataclass
class Findings:
    """Figures of a soak, and what was wrong."""

    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def require(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)


@contextmanager
def server(model: Path, log: Path, *words: str) -> Iterator[str]:
    """The address of an `exact` server of `model` on the CPU."""
    whole = {**os.environ, "DSV4_PRECISION": "exact", "OMP_NUM_THREADS": "1"}
    whole["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [whole.get("PYTHONPATH")])])
    command = ["dsv4", "serve", str(model), "--cpu", "--skip-tokenizer-init", *words]
    with started(command, whole, log, READY_SECONDS) as url:
        yield url


def processes() -> list[psutil.Process]:
    """Those of the server, which this process started, and that still run."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ]


def memory() -> int:
    """Bytes of the server's processes, shared pages once."""
    total = 0
    for process in processes():
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


async def record(client: Client, asked: list[Question]) -> dict[Question, list[int]]:
    """The answer to each question, alone and with nothing cached."""
    recorded = {}
    for question in asked:
        await client.flush()
        recorded[question], ended = await client.answer(question)
        assert ended == "length", ended
    return recorded


async def retractions(client: Client) -> int:
    """Requests that the scheduler took back so far."""
    async with client.session.get(client.url + "/metrics") as response:
        text = await response.text()
    counts = re.findall(r"^sglang:num_retracted_requests_total\{.*\} (\S+)", text, re.MULTILINE)
    return int(sum(map(float, counts)))


async def soak(options: argparse.Namespace, url: str, findings: Findings) -> None:
    """All rounds against the server at `url`."""
    config = json.loads((options.model / "config.json").read_text())
    vocab, context = config["vocab_size"], config["max_position_embeddings"]
    limits = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=limits) as session:
        client = Client(url, session)
        started_at = time.monotonic()
        # Together every page of the pool, with their answers.
        halves = [
            Question(tuple(5 + n * step % 997 for n in range(options.pool_tokens // 2 - PAGE)), 4)
            for step in (1, 2)
        ]
        recorded = await record(client, [*questions(vocab, options.seed), *halves])
        full = [recorded.pop(half) for half in halves]
        findings.figures["prompts"] = len(recorded)
        findings.figures["seconds to record"] = round(time.monotonic() - started_at, 1)
        await client.idle()
        await client.flush()
        begun = await client.load()
        findings.figures["tokens in use at the start"] = begun["num_used_tokens"]
        traffic = Traffic(client, recorded, wrong_bodies(vocab, context), options.seed)
        end, rows = time.monotonic() + options.seconds, []
        for number in range(options.rounds):
            left = options.requests - sum(row["requests"] for row in rows)
            row = await one_round(
                traffic,
                left // (options.rounds - number),
                options.streams,
                (end - time.monotonic()) / (options.rounds - number),
                findings,
            )
            rows.append(row)
            print(f"round {number + 1}: {json.dumps(row)}", flush=True)
            findings.require(
                row["tokens in use after"] == begun["num_used_tokens"],
                f"round {number + 1} left {row['tokens in use after']} tokens of the pool in use,"
                f" {begun['num_used_tokens']} at the start",
            )
        findings.figures["rounds"] = rows
        findings.require(rows[0]["requests"] > 0, "no request was sent")
        grown = rows[-1]["memory after, bytes"] / rows[0]["memory after, bytes"] - 1
        findings.figures["memory grown from the first round to the last"] = round(grown, 4)
        findings.require(
            grown <= MEMORY_SHARE, f"memory grew by {grown:.1%} from the first round to the last"
        )
        again = [tokens for tokens, _ in await asyncio.gather(*map(client.answer, halves))]
        findings.figures["two prompts of half the pool, afterwards"] = (
            "answered as before" if again == full else "answered otherwise"
        )
        findings.require(again == full, "two prompts of half the pool are answered otherwise")


async def one_round(
    traffic: Traffic, requests: int, streams: int, seconds: float, findings: Findings
) -> dict[str, Any]:
    client = traffic.client
    before, began = await retractions(client), time.monotonic()
    tally = await traffic.round(requests, streams, seconds)
    took = time.monotonic() - began
    findings.faults += tally.faults
    await client.idle()
    await client.flush()
    load = await client.load()
    return {
        "requests": sum(tally.asked.values()),
        "right": sum(tally.right.values()),
        "by kind": dict(tally.asked),
        "open at once, most": tally.most_open,
        "tokens answered": tally.tokens,
        "seconds": round(took, 1),
        "requests taken back": await retractions(client) - before,
        "tokens in use after": load["num_used_tokens"],
        "memory after, bytes": memory(),
    }


async def lose_a_rank(url: str, log: Path, findings: Findings) -> None:
    """Kills rank 1 of the server of two at `url` while requests run."""
    [victim] = [each for each in processes() if "TP1" in " ".join(each.cmdline())]
    main = {each.pid for each in processes()}
    async with aiohttp.ClientSession() as session:
        client = Client(url, session)
        waiting = [
            asyncio.ensure_future(client.answer(Question((5 + n, 6, 7), 1000))) for n in range(8)
        ]
        while not (await client.load())["num_running_reqs"]:
            await asyncio.sleep(0.1)
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        ended = await asyncio.wait_for(
            asyncio.gather(*waiting, return_exceptions=True), END_SECONDS
        )
        answered = time.monotonic() - killed
    while any(each.pid in main for each in processes()):
        if time.monotonic() - killed > END_SECONDS:
            findings.faults.append(f"processes ran {END_SECONDS} s after rank 1 was killed")
            break
        await asyncio.sleep(0.2)
    said = [line for line in log.read_text().splitlines() if f"pid={victim.pid}" in line]
    findings.figures["rank 1 of 2 killed"] = {
        "requests that ended with an error": sum(isinstance(each, Exception) for each in ended),
        "of": len(ended),
        "seconds until they had": round(answered, 1),
        "seconds until every process had ended": round(time.monotonic() - killed, 1),
        "the log": re.sub(r"^\[.*?\] ", "", said[0]) if said else "",
    }
    findings.require(bool(said), "the log does not say that a rank ended")
    findings.require(
        all(isinstance(each, Exception) for each in ended),
        "a request of the server that lost a rank was answered",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=ROOT / "checkpoints" / "tiny")
    add("--requests", type=int, default=600)
    add("--seconds", type=float, default=600, help="of traffic (default: %(default)s)")
    add("--streams", type=int, default=64, help="requests at a time (default: %(default)s)")
    add("--rounds", type=int, default=3)
    add("--pool-tokens", type=int, default=12288)
    add("--seed", type=int, default=1)
    add(
        "--two-ranks",
        type=Path,
        default=ROOT / "tests" / "data" / "golden",
        help="model of the server that loses a rank; its sizes must divide by 2",
    )
    add("--out", type=Path, help="file for the figures, JSON")
    options = parser.parse_args()
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="dsv4-soak-") as directory:
        log = Path(directory, "log")
        load = os.getloadavg()[0]
        pool = ["--max-total-tokens", str(options.pool_tokens), "--enable-metrics"]
        pool += ["--swa-full-tokens-ratio", str(WINDOW_SHARE)]
        pool += ["--max-running-requests", str(options.streams)]
        # Admits more than fits, so that requests are taken back.
        pool += ["--schedule-conservativeness", "0.1"]
        with server(options.model, log, *pool) as url:
            asyncio.run(soak(options, url, findings))
        with server(options.two_ranks, log, "--tp", "2") as url:
            asyncio.run(lose_a_rank(url, log, findings))
    model = options.model.resolve()
    document = {
        "what": f"benchmarks/soak.py: {options.streams} streams, exact,"
        f" {model.relative_to(ROOT) if model.is_relative_to(ROOT) else model.name},"
        f" a pool of {options.pool_tokens} tokens",
        "device": environment.machine(),
        "load before": round(load, 1),
        "date": datetime.date.today().isoformat(),
        "commit": environment.commit(),
        "versions": environment.versions(),
        **findings.figures,
        "faults": findings.faults,
    }
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())
