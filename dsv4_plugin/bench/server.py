"""The server that is measured: what a running one says of itself, and starting one for a
measurement."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipe.command import of_this_python
from .client import BenchError

_SECRETS = re.compile(r"key|token|password|secret|credential", re.IGNORECASE)
_OWN_PLACE = ("--host", "--port")


def get_json(url: str, timeout: float = 30) -> Any:
    """JSON of a GET. Raises OSError when nothing answers and BenchError for an answer that is
    none."""
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        text = answer.read()
    try:
        return json.loads(text)
    except ValueError:
        raise BenchError(
            f"{url} answers {text[:60]!r}, which is no JSON; is it an OpenAI-compatible server?"
        ) from None


@dataclass(frozen=True)
class Server:
    """A running server and its own account of what it serves. `arguments` is empty for a server
    other than SGLang."""

    url: str
    model: str
    """The name that requests give."""
    model_path: str
    tokenizer: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tp(self) -> int:
        return int(self.arguments.get("tp_size") or 1)

    @property
    def pp(self) -> int:
        return int(self.arguments.get("pp_size") or 1)

    @property
    def gpus(self) -> int:
        """GPUs that throughput divides by. Data-parallel attention runs on those of tensor
        parallelism."""
        return self.tp * self.pp

    @property
    def launch(self) -> str:
        """Its arguments without its address; "" when it does not tell."""
        words = str(self.arguments.get("launch_command") or "").split()
        return " ".join(
            word
            for index, word in enumerate(words)
            if word not in _OWN_PLACE and (index == 0 or words[index - 1] not in _OWN_PLACE)
        )

    def layout(self) -> dict[str, Any]:
        """InferenceX's fields of the parallel layout."""
        attention = int(self.arguments.get("attn_dp_size") or 1) > 1 or bool(
            self.arguments.get("enable_dp_attention")
        )
        spec = self.arguments.get("speculative_algorithm")
        return {
            "tp": self.tp,
            "pp": self.pp,
            "ep": int(self.arguments.get("ep_size") or 1),
            "dp_attention": str(attention).lower(),
            "num_gpus": self.gpus,
            "disagg": self.arguments.get("disaggregation_mode", "null") != "null",
            "spec_decoding": str(spec).lower() if spec else "none",
        }

    def safe_arguments(self) -> dict[str, Any]:
        """Its resolved arguments that are set, without what may be a secret and without its
        internal state."""
        return {
            name: value
            for name, value in self.arguments.items()
            if isinstance(value, (str, int, float))
            and value not in ("", "<redacted>")
            and not (_SECRETS.search(name) and isinstance(value, str) and name != "tokenizer_path")
        }


def model_name(url: str) -> str:
    """The name by which requests ask the server at `url` for its model. Raises BenchError naming
    the address when it tells none."""
    if not re.match(r"https?://", url):
        raise BenchError(f"{url} is no address of a server; give one as http://127.0.0.1:30000")
    address = f"{url.rstrip('/')}/v1/models"
    try:
        return str(get_json(address)["data"][0]["id"])
    except OSError as error:
        raise BenchError(
            f"no server answers at {address}: {getattr(error, 'reason', error)}"
        ) from None
    except (KeyError, IndexError, TypeError):
        raise BenchError(f"{address} names no model") from None


def describe(url: str, tokenizer: str | None = None) -> Server:
    """Asks the server at `url` what it serves. Raises BenchError naming the address when nothing
    usable answers.

    `tokenizer` is needed where the server names a directory that this machine or working directory
    does not have.
    """
    url = url.rstrip("/")
    model = model_name(url)
    try:
        info, arguments = get_json(f"{url}/model_info"), get_json(f"{url}/server_info")
    except (urllib.error.HTTPError, BenchError):
        info, arguments = {}, {}
    model_path = info.get("model_path") or model
    return Server(
        url,
        model,
        model_path,
        _tokenizer(tokenizer or info.get("tokenizer_path") or model_path, url),
        arguments,
    )


def _tokenizer(name: str, url: str) -> str:
    path = Path(name)
    if path.exists():
        return str(path.resolve())
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name  # a name on the Hugging Face hub
    raise BenchError(
        f"the server at {url} uses the tokenizer {name}, which is not found from here; give its"
        " directory with --tokenizer"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(
    words: Sequence[str], environment: Mapping[str, str], log: Path, ready_seconds: float
) -> Iterator[str]:
    """The address of a server started with `words` (`dsv4 serve ...`), ready to answer; it is
    stopped at the end.

    `environment` is its whole environment. Raises BenchError with the server's own complaint when
    it ends first or is not ready in time.
    """
    port = words[words.index("--port") + 1] if "--port" in words else str(free_port())
    command = [*of_this_python(words), *([] if "--port" in words else ["--port", port])]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=dict(environment),
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await(url, process, log, ready_seconds)
        yield url
    finally:
        _stop(process)


def _await(url: str, process: subprocess.Popen, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    said = log.read_text(errors="replace").splitlines()
    errors = [line for line in said if "error:" in line.lower()] or [
        line for line in said if line.strip()
    ][-1:]
    how = (
        f"was not ready after {seconds:g} s"
        if process.poll() is None
        else f"ended with status {process.returncode}"
    )
    raise BenchError(
        f"the server {how}; its log {log} says: {errors[-1].strip() if errors else 'nothing'}"
    )


def _stop(process: subprocess.Popen) -> None:
    """Ends the server and all processes that it started: it is asked first, and has time to end its
    workers."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(30)
