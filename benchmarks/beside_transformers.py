"""One stream on a CPU beside transformers: the same trained checkpoint, prompt and threads.

    python benchmarks/beside_transformers.py [--threads N] [--rounds N] [--json FILE]

A round is a prefill of the prompt by every side in turn, then greedy decode steps, one of each side
in turn, so that a machine that others use slows them alike. Kept are the best prefill and the
median step; `--clock cpu` counts the process's own seconds instead of the wall's. Ours is the
engine without a server (`runtime/engine.py`); transformers caches in memory
of its activations' dtype, ours in `serving` in the pages of FP8 that a server has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.runtime import Engine

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "tiny"


@dataclass(frozen=True)
class Times:
    """The best prefill and the median decode step, in seconds."""

    prefill: float
    step: float


class Clock:
    """Wall or CPU time of one call."""

    def __init__(self, kind: str):
        self.now = time.perf_counter if kind == "wall" else time.process_time

    def seconds(self, run: Callable[[], object]) -> float:
        start = self.now()
        run()
        return self.now() - start


class Ours:
    """The engine in one precision."""

    def __init__(self, precision: str, tokens: int):
        model = DeepseekV4(Geometry.from_dir(CHECKPOINT), Precision(precision), parts="backbone")
        load_checkpoint(model, CHECKPOINT)
        self.engine = Engine(model, max_tokens=2 * tokens, max_requests=1)
        self.sequence = None

    def prefill(self, prompt: list[int]) -> None:
        if self.sequence is not None:
            self.engine.close(self.sequence)
        self.sequence = self.engine.open()
        self._run(prompt)

    def step(self) -> None:
        self._run([self.token])

    def _run(self, tokens: list[int]) -> None:
        streams = self.engine.forward([(self.sequence, tokens)])
        self.token = int(self.engine.logits(streams[-1:]).argmax())


class Transformers:
    """transformers' own DeepSeek-V4, weights decoded once, in one dtype."""

    def __init__(self, dtype: torch.dtype, experts: str):
        from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = (
            DeepseekV4ForCausalLM.from_pretrained(
                CHECKPOINT,
                dtype=dtype,
                quantization_config=FineGrainedFP8Config(dequantize=True),
                attn_implementation="eager",
                experts_implementation=experts,
            )
            .to(dtype)
            .eval()
        )

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> None:
        self.cache = None
        self._run(prompt)

    @torch.inference_mode()
    def step(self) -> None:
        self._run([self.token])

    def _run(self, tokens: list[int]) -> None:
        out = self.model(
            torch.tensor([tokens]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache, self.token = out.past_key_values, int(out.logits[0, -1].argmax())


def sides(tokens: int) -> dict[str, Callable[[], Ours | Transformers]]:
    """Every side by name; of transformers' expert implementations the two that are fastest here."""
    return {
        "ours, serving": lambda: Ours("serving", tokens),
        "ours, exact": lambda: Ours("exact", tokens),
        "transformers, bf16, grouped_mm": lambda: Transformers(torch.bfloat16, "grouped_mm"),
        "transformers, bf16, batched_mm": lambda: Transformers(torch.bfloat16, "batched_mm"),
        "transformers, fp32, grouped_mm": lambda: Transformers(torch.float32, "grouped_mm"),
    }


def measure(
    made: dict[str, Ours | Transformers], prompt: list[int], rounds: int, steps: int, clock: Clock
) -> dict[str, Times]:
    """Times of every side, all of them in turn."""
    prefills, decodes = {name: [] for name in made}, {name: [] for name in made}
    for _ in range(rounds):
        for name, side in made.items():
            prefills[name].append(clock.seconds(partial(side.prefill, prompt)))
        for _ in range(steps):
            for name, side in made.items():
                decodes[name].append(clock.seconds(side.step))
    return {name: Times(min(prefills[name]), statistics.median(decodes[name])) for name in made}


def ratios(times: dict[str, Times]) -> dict[str, float]:
    """How many times as fast ours is as the fastest of transformers in the same kind of numbers."""
    found = {}
    for ours, theirs in (("serving", "bf16"), ("exact", "fp32")):
        others = [
            time for name, time in times.items() if name.startswith(f"transformers, {theirs}")
        ]
        mine = times[f"ours, {ours}"]
        for what in ("prefill", "step"):
            fastest = min(getattr(other, what) for other in others)
            found[f"{ours}, {what}"] = fastest / getattr(mine, what)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    parser.add_argument("--tokens", type=int, default=3014, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="decode steps a round")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu on a machine others use too"
    )
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompt = torch.randint(
        4, 2000, (arguments.tokens,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    made = {name: make() for name, make in sides(arguments.tokens).items()}
    load = os.getloadavg()[0]
    times = measure(made, prompt, arguments.rounds, arguments.steps, Clock(arguments.clock))
    for name, time_ in times.items():
        print(
            f"{name:32}prefill {time_.prefill:6.2f} s, step {1e3 * time_.step:6.2f} ms,"
            f" {1 / time_.step:5.1f} tokens/s"
        )
    for name, ratio in ratios(times).items():
        print(f"{name:32}{ratio:.2f} times as fast")
    if arguments.json:
        kept = {
            "what": "benchmarks/beside_transformers.py: one stream, checkpoints/tiny",
            "cpu": platform.processor() or platform.machine(),
            "threads": arguments.threads,
            "clock": arguments.clock,
            "load before": round(load, 1),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
            "prompt tokens": arguments.tokens,
            "seconds": {name: asdict(each) for name, each in times.items()},
            "times as fast": ratios(times),
        }
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
