"""Trains a DSpark draft for the tiny checkpoint, whose backbone stays as it is.

    python examples/train_tiny/train_draft.py CHECKPOINT OUT [--minutes M]

Reads the trained CHECKPOINT and writes OUT, the same model with a DSpark draft in the place of its
MTP block, in the released format; OUT/training_log.jsonl tells how it went. A step takes about two
seconds of one core; some 780 of them made checkpoints/tiny-dspark.

The backbone reads text without gradients, half of it written by itself, since that is what a draft
must foresee; from random anchors in it the draft proposes a block, and its laws are drawn to the
backbone's (docs/model.md §3.8). The losses follow §3.3 of DeepSeek's DSpark report, with the
cross-entropy against the backbone's law in the place of the text's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from export import HELD_OUT, released
from lessons import Lessons
from muon import Muon
from network import BlockAttention, Lesson, Rounded, round_latent
from safetensors.torch import load_file
from text import corpus
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.checkpoint.tiny import write_checkpoint
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.model.attention import Attention
from dsv4_plugin.model.linear import Activation, Linear
from dsv4_plugin.ops import grouped_output
from dsv4_plugin.ops.block_fp8_linear import linear_fp32
from dsv4_plugin.ops.rms_norm_quant import rms_norm
from dsv4_plugin.ops.rope import apply_rope, rotation
from dsv4_plugin.runtime import Engine

WINDOW = 128
STAGES, BLOCK, RANK = 1, 5, 64
BATCH, LENGTH, ANCHORS = 2, 512, 96
GAPS = (3, 6, 12, 24, 48)
MATRIX_RATE, VECTOR_RATE = 0.02, 0.004
LOG_STEPS = 10
OWN, RENEW = 64, 1000
"""Documents that the backbone wrote itself, and after how many steps it writes others."""
PRIOR = 5.0
"""Times that a token counts as followed by any, before the text is looked at."""
TEMPERATURES = (0.0, 0.5, 0.8, 1.0)
SOFT_WEIGHT, DISTANCE_WEIGHT, CONFIDENCE_WEIGHT = 0.5, 0.9, 1.0
"""Of cross-entropy with the backbone's law, of the distance of the two laws, of the confidence."""


def with_draft(config: dict) -> dict:
    """The config.json of the checkpoint with a DSpark draft that reads all of its three layers."""
    layers = config["num_hidden_layers"]
    taps = list(range(layers))
    return config | {
        "compress_ratios": [*config["compress_ratios"][:layers], *[0] * STAGES],
        "dspark_block_size": BLOCK,
        "dspark_noise_token_id": config["vocab_size"] - 1,
        "dspark_target_layer_ids": taps,
        "dspark_markov_rank": RANK,
        # SGLang looks here first, and without it guesses layers, which it cannot among three.
        "dflash_config": {"target_layer_ids": taps},
    }


@dataclass
class Anchored:
    """What a stage reads beside its input: the context before each of N anchors, and positions."""

    token_ids: Tensor
    """int64 [N·γ]"""
    context: Tensor
    """[B·T, d] `x_ctx` of all tokens of the batch."""
    seen: Tensor
    """int64 [N, 128]: rows of the context before each anchor, -1 where there is none."""
    context_rotation: tuple[Tensor, Tensor]
    """(cos, sin) [B·T, 32]"""
    rotation: tuple[Tensor, Tensor]
    """(cos, sin) [N·γ, 32]"""
    rows: None = None
    """Of attention replicas (`model.step.Step`): there are none."""


class AnchoredAttention(Attention):
    """Attention of a draft's stage over blocks: the class of its stages in place of Attention."""

    def forward(self, x: Activation, step: Anchored) -> Tensor:
        """[N·γ, d] of normed `x` [N·γ, d]; every row of a block sees context and block."""
        x = x.values
        count, (cos, sin) = step.seen.shape[0], step.rotation
        qr = rms_norm(self.wq_a(x), self.q_norm.weight, self.eps)
        q = rms_norm(self.wq_b(qr).unflatten(-1, (self.heads, self.head_dim)), None, self.eps)
        q = apply_rope(q, cos, sin).view(count, -1, self.heads, self.head_dim)
        own = apply_rope(rms_norm(self.wkv(x), self.kv_norm.weight, self.eps), cos, sin)
        context = rms_norm(self.wkv(step.context), self.kv_norm.weight, self.eps)
        context = round_latent(apply_rope(context, *step.context_rotation))
        own = round_latent(own).view(count, -1, self.head_dim)
        keys = torch.cat((context[step.seen.clamp_min(0)], own), 1)
        logits = torch.einsum("nthd,nkd->nthk", q, keys) * self.softmax_scale
        hidden = F.pad(step.seen < 0, (0, keys.shape[1] - WINDOW))
        logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
        sink = self.attn_sink.view(1, 1, -1, 1).expand(*logits.shape[:3], 1)
        p = torch.cat((logits, sink), -1).softmax(-1)[..., :-1]
        o = torch.einsum("nthk,nkd->nthd", p, keys).flatten(0, 1)
        o = apply_rope(o, cos, sin, inverse=True)
        return self.wo_b(grouped_output(o, self.wo_a.weight, None, self.groups))


def older_model(checkpoint: Path) -> DeepseekV4:
    """The model of the checkpoint as it is."""
    model = DeepseekV4(Geometry.from_dir(checkpoint), Precision.EXACT)
    load_checkpoint(model, checkpoint)
    return model


def pairs(tokens: list[int], vocab: int) -> tuple[Tensor, Tensor]:
    """(markov_w1, markov_w2) fp32 [vocab, RANK] of a text: the low-rank matrix nearest to the
    logarithm of how much likelier a token is after another than anywhere."""
    ids = torch.tensor(tokens)
    seen = torch.bincount(ids[:-1] * vocab + ids[1:], minlength=vocab**2).view(vocab, vocab)
    often, share = seen.sum(1, keepdim=True), (seen.sum(0) + 1.0) / (seen.sum() + vocab)
    gain = ((seen + PRIOR * share) / (often + PRIOR) / share).log()
    rows, columns = (often + 1.0).sqrt(), share.sqrt()
    u, s, v = torch.svd_lowrank(rows * gain * columns, RANK, niter=4)
    return u * s.sqrt() / rows, v * s.sqrt() / columns.unsqueeze(1)


def build(older: DeepseekV4, config: dict, tokens: list[int]) -> DeepseekV4:
    """The backbone of `older`, frozen, and a draft to train, whose stages start as its MTP block
    and whose low-rank head as the pairs of `tokens`."""
    first, second = pairs(tokens, config["vocab_size"])
    model = DeepseekV4(Geometry.from_config(with_draft(config)), Precision.EXACT)
    known = older.state_dict()
    for name, parameter in model.named_parameters():
        start = name
        if name.startswith("mtp."):
            start = "mtp.0." + name.split(".", 2)[2]
        if start in known:
            parameter.data.copy_(known[start])
        elif "norm" in name:
            parameter.data.fill_(1.0)
        elif "markov" in name:
            parameter.data.copy_(first if "markov_w1" in name else second)
        else:  # the confidence starts at one half
            gain = 0.0 if "confidence" in name else 1.0
            parameter.data.normal_().mul_(gain * parameter.shape[-1] ** -0.5)
        drafting = name.startswith("mtp.") and not name.endswith("gate.bias")
        parameter.requires_grad_(drafting and parameter.is_floating_point())
    learn_from_blocks(model)
    for module in model.mtp.modules():
        if isinstance(module, Linear):
            stored = model.geometry.expert_dtype if module.weight.dim() == 3 else "fp8"
            parametrize.register_parametrization(module, "weight", Rounded(stored), unsafe=True)
    return model


def learn_from_blocks(model: DeepseekV4) -> None:
    """From now on attention is over whole sequences and over blocks of anchors, with gradients."""
    for layer in model.layers:
        layer.attn.__class__ = BlockAttention
    for stage in model.mtp:
        stage.attn.__class__ = AnchoredAttention


@torch.inference_mode()
def written(model: DeepseekV4, lessons: Lessons, rng: random.Random) -> Tensor:
    """Documents int64 [OWN, LENGTH] that begin as lessons and that `model` continues, greedily or
    at a temperature."""
    engine = Engine(model, max_tokens=OWN * LENGTH, max_requests=OWN)
    documents = [
        lessons.batch(rng, 1, rng.randrange(64, 193), GAPS).tokens[0].tolist() for _ in range(OWN)
    ]
    sequences = [engine.open() for _ in documents]
    heat = torch.tensor(TEMPERATURES).clamp_min(1e-3).repeat(OWN // len(TEMPERATURES)).unsqueeze(-1)
    chance = torch.Generator().manual_seed(rng.randrange(2**31))
    streams = [
        engine.forward([(sequence, tokens)])[-1:] for sequence, tokens in zip(sequences, documents)
    ]
    logits = engine.logits(torch.cat(streams))
    while True:
        drawn = torch.multinomial((logits / heat).softmax(-1), 1, generator=chance)
        for tokens, (token,) in zip(documents, drawn.tolist()):
            tokens.append(token)
        going = [(s, tokens[-1:]) for s, tokens in zip(sequences, documents)]
        if min(map(len, documents)) >= LENGTH:
            return torch.tensor([tokens[:LENGTH] for tokens in documents])
        logits = engine.logits(engine.forward(going))


@torch.no_grad()
def read(model: DeepseekV4, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(taps [B, T, a·d], logits [B, T, vocab]) of the backbone, rounded as `official`."""
    positions = torch.arange(tokens.shape[1])
    rotations = {
        ratio: rotation(positions, getattr(model, f"frequencies_{ratio}"))
        for ratio in {*model.geometry.compress_ratios}
    }
    lesson = Lesson(tokens.flatten(), tokens.shape[0], rotations, rounding=True, sparse=True)
    streams = model.embedded(lesson.token_ids).unsqueeze(1).expand(-1, model.geometry.hc_mult, -1)
    taps = []
    for layer in model.layers:
        streams = layer(streams, lesson)
        if layer.layer in model.geometry.dspark.target_layer_ids:
            taps.append(streams.mean(1))
    logits = linear_fp32(model.collapse(streams), model.head.weight)
    return torch.cat(taps, -1).view(*tokens.shape, -1), logits.view(*tokens.shape, -1)


def propose(model: DeepseekV4, taps: Tensor, tokens: Tensor, row: Tensor, at: Tensor):
    """(logits [N, γ, vocab], confidence before its sigmoid [N, γ]) after the anchors at position
    `at` of `row`, each int64 [N]; the markov head reads the tokens of the text."""
    draft, first, last = model.mtp, model.mtp[0], model.mtp[-1]
    x = rms_norm(first.main_proj(taps), first.main_norm.weight, draft.eps)
    length, before = tokens.shape[1], at.unsqueeze(-1) + torch.arange(-WINDOW, 0)
    block = at.unsqueeze(-1) + torch.arange(BLOCK)
    ids = draft.block(tokens[row, at])
    step = Anchored(
        ids,
        x.flatten(0, 1),
        (row.unsqueeze(-1) * length + before).masked_fill(before < 0, -1),
        rotation(torch.arange(length).repeat(tokens.shape[0]), draft.frequencies),
        rotation(block.flatten(), draft.frequencies),
    )
    streams = model.embedded(ids).unsqueeze(1).expand(-1, draft.streams, -1)
    for stage in draft:
        streams = stage(streams, step)
    hidden = last.collapsed(streams)
    base = linear_fp32(rms_norm(hidden, last.norm.weight, draft.eps), model.head.weight)
    e = last.markov_head.markov_w1.weight[tokens[row.unsqueeze(-1), block]]
    logits = base.unflatten(0, (-1, BLOCK)) + linear_fp32(e, last.markov_head.markov_w2.weight)
    features = torch.cat((hidden.unflatten(0, (-1, BLOCK)), e), -1).detach()
    return logits, linear_fp32(features, last.confidence_head.proj.weight).squeeze(-1)


def losses(model: DeepseekV4, tokens: Tensor, rng: random.Random) -> dict[str, Tensor]:
    """Losses of one batch [B, T] and what to watch."""
    taps, target = read(model, tokens)
    places = [
        (row, rng.randrange(2, tokens.shape[1] - BLOCK))
        for row in range(tokens.shape[0])
        for _ in range(ANCHORS)
    ]
    row, at = torch.tensor(places).T
    logits, sure = propose(model, taps, tokens, row, at)
    p = target[row.unsqueeze(-1), at.unsqueeze(-1) + torch.arange(BLOCK)].softmax(-1)
    log_q = logits.log_softmax(-1)
    weight = torch.exp(-torch.arange(BLOCK) / BLOCK)
    weight = weight / weight.sum()
    soft = -(p * log_q).sum(-1)
    distance = (p - log_q.exp()).abs().sum(-1)
    accepted = 1 - distance.detach() / 2
    confidence = F.binary_cross_entropy_with_logits(sure, accepted, reduction="none")
    total = SOFT_WEIGHT * soft + DISTANCE_WEIGHT * distance + CONFIDENCE_WEIGHT * confidence
    agree = (log_q.argmax(-1) == p.argmax(-1)).float().cumprod(1)
    own = row >= tokens.shape[0] // 2
    return {
        "loss": (total * weight).sum(1).mean(),
        "soft": soft.mean(),
        "overlap": accepted.mean(),
        "confidence": confidence.mean(),
        "agree_first": agree[:, 0].mean(),
        "accepted": agree.sum(1).mean(),
        "accepted_own": agree.sum(1)[own].mean(),
    }


def optimizers(model: DeepseekV4) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the stages, Adam for the rest, as the backbone was trained."""
    matrices, vectors = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inside = parameter.dim() > 1 and not any(
                part in name for part in ("_fn", "markov", "confidence")
            )
            (matrices if inside else vectors).append(parameter)
    return [
        Muon(matrices, MATRIX_RATE, weight_decay=0.02),
        torch.optim.AdamW(vectors, VECTOR_RATE, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def train(
    model: DeepseekV4,
    older: DeepseekV4,
    lessons: Lessons,
    minutes: float,
    steps: int,
    log: Path,
) -> None:
    """Runs until either is over; the rate falls to nothing along whichever ends first."""
    moving, start, gathered = optimizers(model), time.monotonic(), []
    for step in range(steps):
        part = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        if part >= 1:
            break
        rng = random.Random(f"draft {step}")
        if step % RENEW == 0:
            own = written(older, lessons, rng)
        half = BATCH // 2
        text = lessons.batch(rng, BATCH - half, LENGTH, GAPS).tokens
        found = losses(model, torch.cat((text, own[rng.sample(range(OWN), half)])), rng)
        for optimizer in moving:
            optimizer.zero_grad(set_to_none=True)
        found["loss"].backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        rate = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * part))
        for optimizer, base in zip(moving, (MATRIX_RATE, VECTOR_RATE)):
            optimizer.param_groups[0]["lr"] = base * rate
            optimizer.step()
        gathered.append({name: value.item() for name, value in found.items()})
        if (step + 1) % LOG_STEPS == 0:
            line = {"step": step + 1, "seconds": round(time.monotonic() - start)} | {
                name: round(sum(each[name] for each in gathered) / len(gathered), 4)
                for name in gathered[0]
            }
            print(" ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
            with log.open("a") as out:
                out.write(json.dumps(line) + "\n")
            gathered.clear()


def tensors_of(model: DeepseekV4, checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the release: the backbone's as they are in `checkpoint`, byte for byte."""
    kept = load_file(checkpoint / "model.safetensors")
    weights = {
        name.replace(".parametrizations.", ".").replace(".original", ""): value
        for name, value in model.state_dict().items()
    }
    for name, tensor in released(model.geometry, weights):
        yield name, tensor if name.startswith("mtp.") else kept[name]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = json.loads((arguments.checkpoint / "config.json").read_text())
    older = older_model(arguments.checkpoint)
    text, _ = corpus()
    lessons = Lessons(Tokenizer.from_file(str(arguments.checkpoint / "tokenizer.json")), text)
    model = build(older, config, lessons.text)
    log = arguments.out.with_name(arguments.out.name + ".log")
    log.write_text("")
    train(model, older, lessons, arguments.minutes, arguments.steps, log)

    def tokenizer(directory: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(arguments.checkpoint / name, directory / name)

    tensors = tensors_of(model, arguments.checkpoint)
    write_checkpoint(arguments.out, with_draft(config), tensors, tokenizer, force=True)
    shutil.copy(arguments.checkpoint / HELD_OUT, arguments.out / HELD_OUT)
    shutil.move(log, arguments.out / "training_log.jsonl")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
