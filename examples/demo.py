"""A tiny DeepSeek-V4 through the real SGLang server: one streamed chat completion, then the same again from the cache.

Run by `make demo`. Needs no GPU and no download. The weights are random: the answer is noise, and it amplifies every
rounding, so the server runs in `exact` precision, where a prefix from the cache must give the very same answer.
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
from pathlib import Path

import psutil
from openai import OpenAI

# Longer than two pages of 256 tokens, so that a second request finds whole pages in the prefix cache.
QUESTION = "Once upon a time a request met a page table. " * 14 + "What did the page table say?"


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(server: subprocess.Popen, url: str, log: Path, limit: float) -> None:
    """Returns when `url`/health answers; shows the seconds; exits with the log's tail if the server stops or stalls."""
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
def serving(model: Path, log: Path, precision: str):
    """Runs `dsv4 serve` on `model`; yields (URL, process, seconds from command to ready); stops it at the end."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("dsv4")), "serve", str(model), "--cpu", "--port", str(port),
               "--enable-cache-report"]
    print(f"== DSV4_PRECISION={precision}", " ".join(command))
    start = time.monotonic()
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                                  env=os.environ | {"DSV4_PRECISION": precision})
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


def printable(text: str) -> str:
    return re.sub(r"[^ -~]", "·", text)


def chat(client: OpenAI, tokens: int) -> tuple[str, float, int, int]:
    """One streamed answer: (text, tokens/s after the first token, prompt tokens, of these from the cache)."""
    stream = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": QUESTION}], max_tokens=tokens, temperature=0,
        stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True})
    pieces, first, usage = [], None, None
    for event in stream:
        usage = event.usage or usage
        delta = event.choices[0].delta if event.choices else None
        piece = (delta.content or getattr(delta, "reasoning_content", None)) if delta else None
        if piece:
            first = first or time.monotonic()
            pieces.append(piece)
            print(printable(piece), end="", flush=True)
    seconds = time.monotonic() - (first or time.monotonic())
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    print()
    return "".join(pieces), (usage.completion_tokens - 1) / max(seconds, 1e-9), usage.prompt_tokens, cached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--precision", default="exact", choices=("exact", "official", "serving"),
                        help="of the server (default: %(default)s); the answers are compared in exact only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write start-up time, rate and memory there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsv4-demo-") as scratch:
        model = Path(scratch) / "tiny"
        print("== a tiny random checkpoint in the released format")
        subprocess.run([str(Path(sys.executable).with_name("dsv4")), "tiny", str(model)], check=True)
        with serving(model, Path(scratch) / "server.log", arguments.precision) as (url, server, seconds):
            print(f"   ready {seconds:.1f} s after the command")
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            print("== the answer (random weights speak noise)")
            answer, first_rate, prompt, cached = chat(client, arguments.tokens)
            print(f"   {first_rate:.1f} tokens/s, {prompt} prompt tokens, {cached} from the prefix cache")
            print("== the same again")
            again, rate, prompt, cached = chat(client, arguments.tokens)
            resident = resident_bytes(server.pid)
            print(f"   {rate:.1f} tokens/s, {prompt} prompt tokens, {cached} from the prefix cache, "
                  f"{resident / 1e9:.1f} GB resident")
    if arguments.json:
        arguments.json.write_text(json.dumps({
            "precision": arguments.precision, "ready_seconds": round(seconds, 1), "cores": os.cpu_count(),
            "tokens_per_second": [round(first_rate, 1), round(rate, 1)], "resident_bytes": resident,
            "prompt_tokens": prompt, "cached_tokens": cached}, indent=1) + "\n")
    if not cached:
        sys.exit("FAILED: the second request found nothing in the prefix cache")
    if arguments.precision == "exact" and again != answer:
        sys.exit("FAILED: the second answer differs from the first")
    print(f"== done: {cached} of {prompt} prompt tokens came from the prefix cache"
          + (", and the answer is the same" if again == answer else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
