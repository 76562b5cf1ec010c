"""One run of the host's own serving benchmark (`sglang.benchmark.serving`) as a process of its
own, and what it answers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .goodput import goodput

CLIENT = "sglang.benchmark.serving"
"""Module of the client; `sglang.bench_serving` is its older name."""
APIS = {"sglang": "sglang", "openai": "vllm"}
"""How requests are sent -> the client's backend. "sglang" sends token ids, so lengths are exact;
"openai" sends text."""
_BURST = 16
"""Warm-up requests before a load that has no concurrency to keep."""


class BenchError(ValueError):
    """A benchmark that cannot run, or a run that is no measurement."""


@dataclass(frozen=True)
class Workload:
    """What every request asks for. Lengths are drawn uniformly from `range_ratio` to 1 of isl and
    osl, in tokens."""

    isl: int = 8192
    osl: int = 1024
    range_ratio: float = 0.8
    prompts_per_user: int = 10
    warmups_per_user: int = 2
    api: str = "sglang"
    seed: int = 42

    def __post_init__(self):
        for name, value, good in (
            ("--isl", self.isl, self.isl >= 1),
            ("--prompts-per-user", self.prompts_per_user, self.prompts_per_user >= 1),
            ("--warmups-per-user", self.warmups_per_user, self.warmups_per_user >= 0),
        ):
            if not good:
                raise BenchError(
                    f"{name} is {value}; it must be a count above 0"
                    + ", or 0" * name.startswith("--warm")
                )
        if self.osl < 2:
            raise BenchError(f"--osl is {self.osl}; time per output token needs at least 2")
        if not 0 < self.range_ratio <= 1:
            raise BenchError(
                f"--range-ratio is {self.range_ratio}; it must be above 0 and at most 1"
            )
        if int(self.osl * self.range_ratio) < 2:
            raise BenchError(
                f"--range-ratio {self.range_ratio} of --osl {self.osl} allows answers of one token,"
                " which have no time per token"
            )


@dataclass(frozen=True)
class Load:
    """How requests arrive. `concurrency` users in a closed loop, or all at once, or at random with
    `rate` per second."""

    scenario: str
    prompts: int
    warmups: int
    concurrency: int | None = None
    rate: float = math.inf

    @classmethod
    def closed(cls, concurrency: int, workload: Workload) -> Load:
        """Each of `concurrency` users sends its next request when the last one has ended."""
        return cls(
            "closed loop",
            workload.prompts_per_user * concurrency,
            workload.warmups_per_user * concurrency,
            concurrency,
        )

    @classmethod
    def offline(cls, prompts: int) -> Load:
        """All prompts at once; the server's own limits decide how many run together."""
        return cls("offline", prompts, min(prompts, _BURST))

    @classmethod
    def poisson(cls, rate: float, prompts: int) -> Load:
        """Exponential gaps with mean 1/rate seconds, whatever the server does."""
        return cls("poisson", prompts, min(prompts, _BURST), rate=rate)

    @property
    def name(self) -> str:
        """Stem of the files that hold its results."""
        if self.concurrency:
            return f"conc-{self.concurrency}"
        return f"offline-{self.prompts}" if math.isinf(self.rate) else f"rate-{self.rate:g}"


def client_command(
    url: str, model: str, tokenizer: str, load: Load, workload: Workload, output: str
) -> list[str]:
    """Words that run one load against the server at `url`, which calls its model `model`; results
    go to `output`."""
    words = [
        sys.executable,
        "-W",
        "ignore::FutureWarning",
        "-m",
        CLIENT,
        "--backend",
        APIS[workload.api],
        "--base-url",
        url,
        "--model",
        tokenizer,
        "--served-model-name",
        model,
        "--tokenizer",
        tokenizer,
        "--dataset-name",
        "random-ids",
        "--random-input-len",
        str(workload.isl),
        "--random-output-len",
        str(workload.osl),
        "--random-range-ratio",
        f"{workload.range_ratio:g}",
        "--num-prompts",
        str(load.prompts),
        "--warmup-requests",
        str(load.warmups),
        "--request-rate",
        f"{load.rate:g}",
        "--seed",
        str(workload.seed),
        "--output-file",
        output,
        "--output-details",
    ]
    if load.concurrency:
        words += ["--max-concurrency", str(load.concurrency)]
    if workload.api == "sglang":
        # warm-ups repeat the first prompt
        words += ["--tokenize-prompt", "--cache-report", "--flush-cache"]
    return words


@dataclass(frozen=True)
class Run:
    """Figures of one run as the client wrote them (times in milliseconds), and what it sent."""

    figures: dict[str, Any]
    asked_output_tokens: int
    command: list[str]

    def document(self) -> dict[str, Any]:
        return asdict(self)


_DETAILS = (
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "generated_texts",
    "errors",
    "cached_tokens",
    "cached_tokens_details",
    "server_info",
)
_PROGRESS = re.compile(r"(\d+)/(\d+) \[")
_ASKED = re.compile(r"^#Output tokens: (\d+)", re.MULTILINE)


def measure(
    url: str,
    model: str,
    tokenizer: str,
    load: Load,
    workload: Workload,
    progress: Callable[[int], None] = lambda done: None,
) -> Run:
    """Runs the client to its end. `progress` is told how many requests have ended.

    Raises BenchError when the client fails, or when a request did: throughput of a run that lost
    requests means nothing.
    """
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as directory:
        output, said = Path(directory, "result.jsonl"), Path(directory, "said")
        words = client_command(url, model, tokenizer, load, workload, str(output))
        complaints = _run(words, said, progress)
        text = said.read_text(errors="replace")
        if not output.exists():
            raise BenchError(
                "the host's benchmark client ended without a result:"
                f" {_last_words(complaints, text)}"
            )
        figures = json.loads(output.read_text().splitlines()[-1])
    errors = [error for error in figures["errors"] if error]
    if figures["completed"] < load.prompts:
        why = errors[0].strip().splitlines()[-1] if errors else "it gives no reason"
        raise BenchError(
            f"{load.prompts - figures['completed']} of {load.prompts} requests failed: {why}"
        )
    asked = _ASKED.search(text)
    return Run(
        {
            name: None if value == math.inf else value
            for name, value in figures.items()
            if name not in _DETAILS
        }
        | {"goodput": goodput(figures["ttfts"], figures["itls"], figures["duration"])},
        int(asked.group(1)) if asked else figures["total_output_tokens"],
        words,
    )


def _run(words: Sequence[str], said: Path, progress: Callable[[int], None]) -> str:
    """Runs the words; returns the end of stderr, from which the progress bar is read."""
    tail: list[str] = []
    with (
        said.open("w") as out,
        subprocess.Popen(
            words, stdout=out, stderr=subprocess.PIPE, text=True, errors="replace"
        ) as process,
    ):
        try:
            for line in process.stderr:  # universal newlines: every redraw of the bar is a line
                bars = _PROGRESS.findall(line)
                if bars:
                    progress(int(bars[-1][0]))
                else:
                    tail = [*tail, line][-40:]
        except BaseException:
            process.kill()
            raise
    return "".join(tail)


def _last_words(complaints: str, text: str) -> str:
    lines = [line.strip() for line in (complaints or text).splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
