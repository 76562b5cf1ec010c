"""Whether several ranks choose alike: a tiny model, split over processes, whose choices are close
calls (docs/precision.md, "Ranks choose alike")."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoint.load import load_checkpoint
from ..checkpoint.tiny import tiny_config, write_tiny
from ..config import Geometry, Precision
from ..model import DeepseekV4
from ..model.agreement import watched
from ..parallel import Group, Parallel
from .engine import Engine

GROUPS = {
    "tensor": ("attention", "expert_tensor", "shared"),
    "expert": ("attention", "expert", "shared"),
}
"""Layouts that are tried: experts split by their intermediate size, or by their number."""
_TIMEOUT = 600


class RanksError(RuntimeError):
    """A rank that did not come to an end."""


@dataclass(frozen=True)
class Run:
    """Who decides (DSV4_CHOICES), and whether the activations of the last rank are off in their
    last bit."""

    choices: str = "first"
    noisy: bool = False


@dataclass
class Outcome:
    """What one rank computed."""

    compared: int
    differing: int
    """Rows in which any rank's own choice was not rank 0's; the same number on every rank."""
    uneven: int
    """Choices, by kind and layer, that ranks went on with differently."""
    logits: Tensor
    """fp32 [T, vocab], on the CPU."""


def try_ranks(
    size: int, layout: str, device: torch.device, seed: int, runs: Sequence[Run] = (Run(),)
) -> list[list[Outcome]]:
    """For each run the outcomes of `size` ranks of a tiny model full of close calls. Raises
    RanksError when a rank fails."""
    with tempfile.TemporaryDirectory(prefix="dsv4-ranks-") as directory:
        path = Path(directory) / "model"
        write_close_calls(path, seed)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = _on_ranks(size, _one_rank, (layout, path, port, device.type, tuple(runs)))
    return list(map(list, zip(*ranks, strict=True)))


def write_close_calls(path: Path, seed: int) -> None:
    """A tiny checkpoint: 2 layers with an indexer that keeps 8 entries, one of ratio 128, experts
    that 4 ranks can share."""
    config = tiny_config(
        layers=3,
        hidden=128,
        experts=8,
        experts_per_token=3,
        heads=4,
        o_groups=4,
        intermediate=512,
        index_topk=8,
        compress_ratios=[4, 128, 4],
        mtp_blocks=1,
    )
    write_tiny(path, config | {"num_hash_layers": 0}, seed=seed)


def prompt() -> list[int]:
    """Few tokens, repeated: many entries of the indexer are almost the same."""
    return [5, 5, 5, 5, 9, 9, 9, 9] * 20


def make_close_calls(model: DeepseekV4) -> None:
    """Experts by pairs whose gate rows are almost the same, and no bias between them."""
    generator = torch.Generator().manual_seed(3)
    for layer in model.layers:
        gate = layer.ffn.gate
        rows = gate.weight.data
        noise = torch.randn(rows[1::2].shape, generator=generator).to(rows.device, rows.dtype)
        rows[1::2] = rows[::2] + noise * rows[::2].abs() * 1e-7
        if gate.bias is not None:
            gate.bias.data.zero_()


def add_noise(model: DeepseekV4) -> None:
    """Turns the last bit of every second activation that attention and experts read."""

    def turned(module, arguments):
        read, *others = arguments
        values = read.values.clone()
        values.view(torch.int32)[:, ::2] ^= 1
        return read._replace(values=values), *others

    for layer in model.layers:
        layer.attn.register_forward_pre_hook(turned)
        layer.ffn.register_forward_pre_hook(turned)


def _one_rank(
    rank: int, size: int, layout: str, path: Path, port: int, device: str, runs: tuple[Run, ...]
) -> list[Outcome]:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
    )
    group = Group(rank, size, _all_reduce, _broadcast, _all_gather)
    parallel = Parallel(**{name: group for name in GROUPS[layout]})
    where = torch.device("cpu") if device == "cpu" else torch.device(device, rank)
    try:
        return [_run(path, parallel, where, run, run.noisy and rank == size - 1) for run in runs]
    finally:
        dist.destroy_process_group()


def _run(path: Path, parallel: Parallel, where: torch.device, run: Run, noisy: bool) -> Outcome:
    os.environ["DSV4_CHOICES"] = run.choices
    model = DeepseekV4(Geometry.from_dir(path), Precision.EXACT, parallel, where, "backbone")
    load_checkpoint(model, path)
    make_close_calls(model)
    if noisy:
        add_noise(model)
    with watched() as seen:
        logits = Engine(model, max_tokens=1024, max_requests=1).score(prompt(), [100, 1, 59])
    return Outcome(seen.compared, sum(seen.differing.values()), len(seen.uneven), logits.cpu())


def _all_reduce(x: Tensor) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x)
    return x


def _broadcast(x: Tensor) -> Tensor:
    dist.broadcast(x, 0)
    return x


def _all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def _on_ranks(size: int, work: Callable[..., Any], arguments: tuple) -> list[Any]:
    """Results of work(rank, size, *arguments), each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(size) as pool:
        running = [pool.apply_async(work, (rank, size, *arguments)) for rank in range(size)]
        results, errors = [], []
        for rank, each in enumerate(running):
            try:
                results.append(each.get(_TIMEOUT))
            except multiprocessing.TimeoutError:
                raise RanksError(f"rank {rank} of {size} did not end in {_TIMEOUT} s") from None
            except Exception as error:
                errors.append((rank, error))
        if errors:  # those that lost a peer say so; the one that failed by itself says why
            rank, error = next((e for e in errors if "peer" not in str(e[1])), errors[0])
            raise RanksError(f"rank {rank} of {size}: {type(error).__name__}: {error}") from error
        return results
