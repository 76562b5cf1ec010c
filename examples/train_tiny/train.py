"""Trains the tiny checkpoint: text and facts, short sequences first, then longer ones, then through
the quantisers.

    python examples/train_tiny/train.py STATE_DIR [--minutes M]

Stops after M minutes or when done, and goes on from where it stopped when called again. STATE_DIR
gets tokenizer.json, state.pt and log.jsonl; `export.py STATE_DIR CHECKPOINT` writes the released
format.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from geometry import VOCAB_SIZE, config
from lessons import Batch, Lessons
from muon import Muon
from network import Lesson, learn, round_weights, trainable
from text import corpus
from text import lessons as recall_sentences
from torch import Tensor, nn

from dsv4_plugin.checkpoint.tiny_tokenizer import learn_merges, write_tokenizer
from dsv4_plugin.config import Geometry
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.ops.block_fp8_linear import linear_fp32
from dsv4_plugin.ops.operator import observed


@dataclass(frozen=True)
class Stage:
    """A part of the course. Rates are relative to the first ones."""

    steps: int
    length: int
    batch: int
    rate: float
    gaps: tuple[int, ...] = (6, 24)
    """Mean lengths of the text between two facts, one drawn for each document."""
    end: float | None = None
    """Rate at the end; that of the next stage unless given."""
    sparse: bool = True
    quantized: bool = False
    draft: bool = False


STAGES = (
    Stage(240, 256, 24, 1.0, gaps=(3, 4, 6, 12, 24), sparse=False),
    Stage(200, 512, 12, 1.0, gaps=(3, 6, 12, 24, 48), sparse=False),
    Stage(200, 1024, 6, 0.7, gaps=(6, 12, 24, 48, 96), quantized=True, draft=True),
    Stage(60, 2048, 3, 0.4, gaps=(12, 24, 48, 96, 192), quantized=True, draft=True),
    Stage(40, 4096, 2, 0.2, gaps=(24, 48, 96, 192), end=0.02, quantized=True, draft=True),
    # Facts side by side once more: an entry that pools parts of two must tell them apart.
    Stage(60, 1024, 6, 0.3, gaps=(1, 2, 6, 24, 96), end=0.02, quantized=True, draft=True),
)
MATRIX_RATE, VECTOR_RATE = 0.02, 0.004
POINTER_WEIGHT = 1.0
"""Of the loss that shows ratio-4 attention and the indexer where a recalled fact was stated."""
PREVIOUS_WEIGHT = 0.1
"""Of the loss that makes the first head of the window layer look one token back: at " Alma likes" a
query of a later layer must know the name, and text alone teaches that late."""
BIAS_STEP = 0.002
LOG_STEPS = 20


def initialize(model: DeepseekV4, seed: int) -> None:
    """Random weights of a size that lets every mechanism start: streams nearly kept, sinks that
    differ by head."""
    generator = torch.Generator().manual_seed(seed)
    n = model.geometry.hc_mult
    for name, parameter in model.named_parameters():
        end = name.rsplit(".", 1)[-1]
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("tid2eid"):
            scores = torch.rand(
                parameter.shape[0], model.geometry.n_routed_experts, generator=generator
            )
            value = scores.argsort(-1)[:, : parameter.shape[1]]
        elif "norm" in name or end.endswith("_scale"):
            value = torch.ones_like(parameter)
        elif end == "attn_sink":
            value = torch.linspace(1.0, 4.0, parameter.shape[0])
        elif end.endswith("_base"):
            value = 0.3 * noise
            if parameter.shape[0] > n:
                value[2 * n :] += 4 * torch.eye(n).flatten()
        elif end in ("ape", "bias"):
            value = 0.0 * noise
        elif "embed" in name:
            value = 0.5 * noise
        else:
            gain = (
                0.3 if any(part in name for part in ("wo_b", "w2", "head.weight", "_fn")) else 1.0
            )
            value = gain * noise * parameter.shape[-1] ** -0.5
        parameter.data.copy_(value)


def optimizers(model: DeepseekV4) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, Adam for embedding, head, norms, sinks and
    hyper-connections."""
    matrices, vectors = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith("gate.bias"):
            inside = (
                parameter.dim() > 1
                and "_fn" not in name
                and "ape" not in name
                and not name.startswith(("embed", "head"))
            )
            (matrices if inside else vectors).append(parameter)
    return [
        Muon(matrices, MATRIX_RATE, weight_decay=0.02),
        torch.optim.AdamW(vectors, VECTOR_RATE, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def entries_of(span: tuple[int, int], at: int) -> range:
    """Ratio-4 entries visible at `at` that hold every token of `span`: entry j pools tokens 4j - 4
    .. 4j + 3."""
    first, last = span
    return range(max(0, -(-(last - 3) // 4)), min((first + 4) // 4, (at + 1) // 4 - 1) + 1)


def pointer_loss(lesson: Lesson, batch: Batch) -> Tensor:
    """How far attention and indexer of the ratio-4 layers are from the entries that hold the facts
    asked for."""
    rows, entries, count = [], [], 0
    for recall in batch.recalls:
        found = {entry for span in recall.spans for entry in entries_of(span, recall.at)}
        if found:
            rows += [(recall.row, recall.at, count)] * len(found)
            entries += found
            count += 1
    if not count:
        return torch.zeros(())
    row, at, query = torch.tensor(rows).T
    entry = torch.tensor(entries)
    loss = torch.zeros(())
    for p, logits in zip(lesson.entry_attention, lesson.index_logits):
        mass = torch.zeros(count).index_add(0, query, p.mean(2)[row, at, entry])
        log_p = logits.log_softmax(-1)
        index_mass = torch.zeros(count).index_add(0, query, log_p[row, at, entry].exp())
        loss = loss - POINTER_WEIGHT * (mass + 1e-4).log().mean() - (index_mass + 1e-4).log().mean()
    return loss


def index_loss(lesson: Lesson) -> Tensor:
    """Cross-entropy of the indexer's scores against what attention gave each entry it saw."""
    loss = torch.zeros(())
    for p, logits in zip(lesson.entry_attention, lesson.index_logits):
        target = p.detach().sum(2)
        target = target / target.sum(-1, keepdim=True).clamp_min(1e-6)
        log_p = logits.masked_fill(target == 0, float("-inf")).log_softmax(-1)
        loss = loss - (target * log_p.masked_fill(target == 0, 0.0)).sum(-1).mean()
    return loss


def token_loss(
    model: DeepseekV4, hidden: Tensor, batch: Batch, ahead: int
) -> tuple[Tensor, Tensor]:
    """(mean weighted cross-entropy of the token `ahead` of each, logits [B, T, vocab])."""
    logits = linear_fp32(hidden, model.head.weight).view(*batch.tokens.shape, -1)
    kept = batch.tokens.shape[1] - ahead
    loss = F.cross_entropy(
        logits[:, :kept].flatten(0, 1), batch.tokens[:, ahead:].flatten(), reduction="none"
    )
    weights = batch.weights[:, ahead - 1 : ahead - 1 + kept].flatten()
    return (loss * weights).sum() / weights.sum(), logits


@torch.no_grad()
def measured(logits: Tensor, batch: Batch) -> dict[str, list[float]]:
    """Loss of ordinary text, and 1 or 0 for every thing asked for, by distance."""
    ordinary = batch.weights[:, :-1] == 1.0
    loss = F.cross_entropy(logits[:, :-1][ordinary], batch.tokens[:, 1:][ordinary])
    values = defaultdict(list, text=[loss.item()])
    guess = logits.argmax(-1)
    for recall in batch.recalls:
        limit = next(
            limit for limit in (128, 512, 1024, 2048, 4096, 1 << 30) if recall.distance < limit
        )
        values[f"recall<{limit}"].append(
            float(guess[recall.row, recall.at] == batch.tokens[recall.row, recall.at + 1])
        )
    return values


class Counting:
    """Counts how often each expert is chosen, to move the router's bias toward balance."""

    def __init__(self):
        self.counts: list[Tensor] = []

    def __call__(self, operator, choice, *args):
        result = choice.run(*args)
        if operator.name == "route":
            self.counts.append(torch.bincount(result[1].flatten(), minlength=args[1].shape[0]))
        return result


def balance(model: DeepseekV4, counts: list[Tensor], draft: bool) -> None:
    """Moves the biases of learned routers against the load (docs/model.md §3.5 uses them for the
    choice alone)."""
    blocks = [*model.layers, *(model.mtp if draft else ())]
    for block, count in zip(blocks, counts):
        if block.ffn.gate.bias is not None:
            block.ffn.gate.bias.data += BIAS_STEP * torch.sign(count.float().mean() - count)


def stage_of(step: int) -> Stage | None:
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return None


def rate(step: int) -> float:
    """The stage's rate, reached through a warm-up, moved toward the next stage's along the way."""
    start = 0
    for stage, following in zip(STAGES, [*STAGES[1:], None]):
        if step < start + stage.steps:
            part = (step - start) / stage.steps
            end = following.rate if stage.end is None else stage.end
            return (stage.rate * (1 - part) + end * part) * min(1.0, (step + 1) / 50)
        start += stage.steps
    return 0.0


class Course:
    """Model, optimisers and position; saved and restored as one."""

    def __init__(self, directory: Path, seed: int):
        self.directory, self.seed = directory, seed
        directory.mkdir(parents=True, exist_ok=True)
        text, _ = corpus()
        if not (directory / "tokenizer.json").exists():
            write_tokenizer(
                directory,
                config()["max_position_embeddings"],
                learn_merges([text, *repeat(recall_sentences(), 100)], VOCAB_SIZE),
            )
        from tokenizers import Tokenizer

        self.lessons = Lessons(Tokenizer.from_file(str(directory / "tokenizer.json")), text)
        self.model = trainable(Geometry.from_config(config()), quantized=False)
        initialize(self.model, seed)
        self.optimizers, self.step, self.quantized = optimizers(self.model), 0, False
        if (directory / "state.pt").exists():
            state = torch.load(directory / "state.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            self.step = state["step"]

    def weights(self) -> dict[str, Tensor]:
        """The parameters, exact, by their names without the quantisers' parts."""
        return {
            name.replace(".parametrizations.", ".").replace(".original", ""): value
            for name, value in self.model.state_dict().items()
        }

    def save(self) -> None:
        part = self.directory / "state.pt.part"
        torch.save(
            {
                "model": self.weights(),
                "step": self.step,
                "optimizers": [each.state_dict() for each in self.optimizers],
            },
            part,
        )
        os.replace(part, self.directory / "state.pt")

    def advance(self, stage: Stage) -> dict[str, list[float]]:
        """One step; what it measured."""
        if stage.quantized and not self.quantized:
            round_weights(self.model)
            self.quantized = True
        batch = self.lessons.batch(
            random.Random(f"{self.seed} {self.step}"), stage.batch, stage.length, stage.gaps
        )
        counting = Counting()
        with observed(counting):
            hidden, drafted, lesson = learn(
                self.model, batch.tokens, stage.quantized, stage.sparse, stage.draft
            )
        loss, logits = token_loss(self.model, hidden, batch, 1)
        values = measured(logits, batch)
        pointer, index = pointer_loss(lesson, batch), index_loss(lesson)
        previous = -sum((p + 1e-4).log().mean() for p in lesson.previous_attention)
        total = loss + pointer + index + PREVIOUS_WEIGHT * previous
        for name, value in (("pointer", pointer), ("index", index), ("previous", previous)):
            values[name].append(value.item())
        if drafted is not None:
            draft_loss, _ = token_loss(self.model, drafted, batch, 2)
            values["draft"].append(draft_loss.item())
            total = total + 0.3 * draft_loss
        values["loss"].append(total.item())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total.backward()
        values["gradient"].append(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item())
        for optimizer, base in zip(self.optimizers, (MATRIX_RATE, VECTOR_RATE)):
            optimizer.param_groups[0]["lr"] = base * rate(self.step)
            optimizer.step()
        balance(self.model, counting.counts, stage.draft)
        self.step += 1
        return values


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("state", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="stop then (default: when the course ends)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    course = Course(arguments.state, arguments.seed)
    start = saved = shown = time.monotonic()
    gathered: dict[str, list[float]] = defaultdict(list)
    while (stage := stage_of(course.step)) and time.monotonic() - start < 60 * arguments.minutes:
        for name, values in course.advance(stage).items():
            gathered[name] += values
        gathered["tokens"].append(stage.length * stage.batch)
        if course.step % LOG_STEPS == 0:
            now = time.monotonic()
            line = {
                "step": course.step,
                "length": stage.length,
                "tokens_per_second": sum(gathered.pop("tokens")) / (now - shown),
            }
            line |= {name: sum(values) / len(values) for name, values in sorted(gathered.items())}
            print(" ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
            with (arguments.state / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            gathered.clear()
            shown = now
            if now - saved > 120:
                course.save()
                saved = now
    course.save()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
