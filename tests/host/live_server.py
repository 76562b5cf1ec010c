"""A real server for tests: started by the user's command, spoken to over HTTP, stopped at the
end."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

DSV4 = Path(sys.executable).with_name("dsv4")
READY_SECONDS = 480
"""Time given to a server to become ready: about 25 s on an idle machine, ten times that on a busy
one of few cores."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen

    def request(self, path: str, body: dict | None = None, timeout: float = 120) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            text = reply.read()
        return json.loads(text) if text else {}

    def generate(self, ids: list[int], new_tokens: int = 1, logprob_start: int = 0) -> dict:
        """Greedy continuation of `ids`; log-probabilities of the input from `logprob_start` on, -1
        for none."""
        return self.request(
            "/generate",
            {
                "input_ids": ids,
                "return_logprob": True,
                "logprob_start_len": logprob_start,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": new_tokens,
                    "ignore_eos": True,
                },
            },
        )

    def flush(self) -> None:
        """Empties the prefix cache; the host refuses while a request is in flight, so it is asked
        again for a while."""
        for _ in range(50):
            try:
                urllib.request.urlopen(
                    urllib.request.Request(self.url + "/flush_cache", method="POST"), timeout=30
                )
                return
            except urllib.error.HTTPError:
                time.sleep(0.2)
        raise AssertionError("the server never became idle enough to flush its cache")


def input_logprobs(reply: dict) -> list[float]:
    """Log-probabilities of the input tokens that were scored; the first token of a sequence has
    none."""
    return [
        entry[0] for entry in reply["meta_info"]["input_token_logprobs"] if entry[0] is not None
    ]


def output_logprobs(reply: dict) -> list[float]:
    return [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]


def output_ids(reply: dict) -> list[int]:
    return [entry[1] for entry in reply["meta_info"]["output_token_logprobs"]]


def stop(process: subprocess.Popen) -> None:
    """Ends a server and all processes it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        time.sleep(1)
    process.wait(30)


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The host's own launch command, with the plugin merely installed, where it is expected to
    refuse.

    A server that starts all the same is stopped with all its processes, and the test fails by the
    timeout.
    """
    command = [
        sys.executable,
        "-m",
        "sglang.launch_server",
        "--device",
        "cpu",
        "--skip-tokenizer-init",
        "--port",
        str(free_port()),
        *arguments,
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"DSV4_DEVICE": "cpu"} | environment,
    )
    try:
        output, errors = process.communicate(timeout=READY_SECONDS)
    except subprocess.TimeoutExpired:
        stop(process)
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@contextmanager
def serving(model: Path, log: Path, *arguments: str, tokenizer: bool = False, **environment: str):
    """A `Server` of `model` on the CPU, ready to answer; stopped when the context ends.

    Without `tokenizer` it takes and returns token ids.
    """
    port = free_port()
    command = [
        str(DSV4),
        "serve",
        str(model),
        "--cpu",
        *(() if tokenizer else ("--skip-tokenizer-init",)),
        "--port",
        str(port),
        *arguments,
    ]
    with log.open("w") as out:
        # One thread: matrices this small gain nothing from more, and threads that wait for each
        # other stall a busy machine.
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", log, process)
        wait_until_ready(server, process)
        yield server
    finally:
        stop(process)


def wait_until_ready(server: Server, process: subprocess.Popen) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            server.request("/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(
        f"the server {'ended' if process.poll() is not None else 'did not become ready'}; "
        f"the end of its log:\n{server.log.read_text()[-4000:]}"
    )


def ask_many(server: Server, questions: list[list[int]], expected: list[list[int]]) -> None:
    """64 at once over 16 `questions`; 20 are given up. Nothing wrong is sent, and the host's own
    account of slots, which ends an idle scheduler that lost one, stays even."""
    replies: dict[int, list[int]] = {}
    new_tokens = len(expected[0])

    def ask(number: int) -> None:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        body = {"input_ids": questions[number % 16], "rid": f"stream-{number:02}"}
        body |= {"return_logprob": True, "sampling_params": sampling}
        replies[number] = output_ids(server.request("/generate", body, timeout=600))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    given_up = random.Random(1).sample(range(64), 20)
    for number in given_up:
        time.sleep(0.1)
        server.request("/abort_request", {"rid": f"stream-{number:02}"})
    for thread in threads:
        thread.join()
    for number, found in replies.items():
        wanted = expected[number % 16]
        assert found == (wanted[: len(found)] if number in given_up else wanted), number
    assert len(replies) == 64
    time.sleep(2)  # the account is checked when nothing runs
    server.flush()
    assert output_ids(server.generate(questions[0], new_tokens, -1)) == expected[0]
