"""A trained tiny DeepSeek-V4 through the real SGLang server: facts sown into thousands of tokens of
text, then asked for.

Run by `make demo`. Needs no GPU, no download and no flag. The first question reads the whole text;
the next ones find it in the prefix cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from openai import OpenAI

from dsv4_plugin.accuracy.gate import checkpoint_directory, draft_directory
from dsv4_plugin.accuracy.recall import fact, held_out, question
from dsv4_plugin.config import Geometry

FACTS = (("Alma", "chess"), ("Gwen", "comets"), ("Otto", "robots"), ("Tess", "tango"))


def story(text: str, characters: int) -> str:
    """`characters` of `text` with a fact after the first sentence of each quarter of it."""
    sentences = re.split(r"(?<=\.) ", text[:characters])[:-1]
    quarter = len(sentences) // len(FACTS)
    parts = []
    for index, (name, thing) in enumerate(FACTS):
        first, *rest = sentences[index * quarter : (index + 1) * quarter]
        parts += [first, fact(name, thing).lstrip(), *rest]
    return " ".join(parts)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(server: subprocess.Popen, url: str, log: Path, limit: float) -> None:
    """Returns when `url`/health answers; shows the seconds; exits with the log's tail if the server
    stops or stalls."""
    start = shown = time.monotonic()
    while time.monotonic() - start < limit:
        if time.monotonic() - shown >= 5:
            shown = time.monotonic()
            print(f"   starting, {shown - start:.0f} s", flush=True)
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health_generate", timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    sys.exit("the server did not become ready; the end of its log:\n" + log.read_text()[-3000:])


def resident_bytes(pid: int) -> int:
    """Memory of a process and its children, pages they share counted once."""
    parent = psutil.Process(pid)
    return sum(each.memory_full_info().pss for each in (parent, *parent.children(recursive=True)))


@contextmanager
def serving(model: Path, log: Path):
    """Runs `dsv4 serve` on `model`; yields (URL, process, seconds from command to ready); stops it
    at the end."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("dsv4")),
        "serve",
        str(model),
        "--cpu",
        "--port",
        str(port),
        "--enable-cache-report",
        "--enable-metrics",
    ]
    if Geometry.from_dir(model).dspark is not None:
        command += ["--speculative-algorithm", "DSPARK"]
    print("==", " ".join(command))
    start = time.monotonic()
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(server, url, log, limit=300)
            yield url, server, time.monotonic() - start
        finally:
            os.killpg(server.pid, signal.SIGINT)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


@dataclass
class Answer:
    """One streamed answer and what it cost."""

    text: str
    first_seconds: float
    tokens_per_second: float
    prompt_tokens: int
    cached_tokens: int
    tokens_per_step: float | None = None
    """With a draft: tokens that a verification gave, the first token of the answer apart."""


def verifications(url: str) -> float:
    """How many the server has made for requests that are answered."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        told = reply.read().decode()
    found = re.search(r"^sglang:spec_verify_calls_total\{.*\} (\S+)$", told, re.MULTILINE)
    return float(found[1]) if found else 0.0


def tokens_per_step(url: str, before: float, tokens: int) -> float | None:
    """Of an answer of `tokens` tokens that has just ended, when `before` verifications had been
    made; the server counts its own a moment later."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        made = verifications(url) - before
        if made:
            return (tokens - 1) / made
        time.sleep(0.1)
    return None


def ask(client: OpenAI, messages: list[dict[str, str]], tokens: int, metrics: str | None) -> Answer:
    """Streams the answer to `messages`, greedily, to the screen. `metrics` is the address of a
    server with a draft."""
    before = verifications(metrics) if metrics else 0.0
    start = time.monotonic()
    stream = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces, first, usage = [], None, None
    for event in stream:
        usage = event.usage or usage
        if event.choices and event.choices[0].delta.content:
            first = first or time.monotonic()
            pieces.append(event.choices[0].delta.content)
            print(pieces[-1], end="", flush=True)
    end = time.monotonic()
    print()
    first = first or end
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return Answer(
        "".join(pieces),
        first - start,
        (usage.completion_tokens - 1) / max(end - first, 1e-9),
        usage.prompt_tokens,
        cached,
        tokens_per_step(metrics, before, usage.completion_tokens) if metrics else None,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=draft_directory(checkpoint_directory()) or checkpoint_directory(),
        help="checkpoint directory (default: checkpoints/tiny-dspark, whose draft is used)",
    )
    parser.add_argument(
        "--characters",
        type=int,
        default=11_000,
        help="of text around the facts (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write start-up time, rates, memory and answers there",
    )
    arguments = parser.parse_args()
    text = story(held_out(arguments.model), arguments.characters)
    drafts = Geometry.from_dir(arguments.model).dspark is not None
    messages, answers, missed = [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="dsv4-demo-") as scratch,
        serving(arguments.model, Path(scratch) / "server.log") as (url, server, seconds),
    ):
        print(f"   ready {seconds:.1f} s after the command")
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        for name, thing in FACTS:
            print(
                f"== {question(name)}"
                + (
                    ""
                    if messages
                    else (
                        f" (after {len(text)} characters of text; its facts are {len(FACTS)}"
                        " sentences in them)"
                    )
                )
            )
            messages.append(
                {
                    "role": "user",
                    "content": question(name) if messages else f"{text}\n{question(name)}",
                }
            )
            answer = ask(client, messages, tokens=24, metrics=url if drafts else None)
            messages.append({"role": "assistant", "content": answer.text})
            per_step = ""
            if answer.tokens_per_step:
                per_step = f", {answer.tokens_per_step:.1f} a step"
            print(
                f"   first token after {answer.first_seconds:.1f} s, then"
                f" {answer.tokens_per_second:.1f} tokens/s{per_step}; {answer.prompt_tokens} prompt"
                f" tokens, {answer.cached_tokens} from the prefix cache"
            )
            answers.append(answer)
            if fact(name, thing) not in answer.text:
                missed.append(fact(name, thing).strip(" ."))
        resident = resident_bytes(server.pid)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {
                    "ready_seconds": round(seconds, 1),
                    "cores": os.cpu_count(),
                    "resident_bytes": resident,
                    "answers": [asdict(answer) for answer in answers],
                },
                indent=1,
            )
            + "\n"
        )
    if missed:
        sys.exit(f"FAILED: the answers do not say that {'; '.join(missed)}")
    if not answers[-1].cached_tokens:
        sys.exit("FAILED: the last question found nothing in the prefix cache")
    print(f"== done: {len(FACTS)} facts recalled, {resident / 1e9:.1f} GB resident")
    return 0


if __name__ == "__main__":
    sys.exit(main())
