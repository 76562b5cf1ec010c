"""A checkpoint whose DSpark draft is often right: it knows what followed each token in
continuations that the model itself gives.

A draft of random weights is never accepted, and accepted runs of every length are what tests want.
Here the head of low rank has a column a token and adds 40 to the logit of its known follower; where
the model's choice depends on more than one token the draft is wrong.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.checkpoint.tiny import VOCAB_SIZE, tiny_config, write_tiny
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.runtime import Engine

CERTAIN = 40.0
"""More than any logit of random weights, which stay below 10."""


def prompts() -> list[list[int]]:
    """In a page, over its end, on it, and longer than a chunk of 256."""
    generator = torch.Generator().manual_seed(5)
    lengths = (7, 250, 256, 520)
    return [torch.randint(2, 120, (n,), generator=generator).tolist() for n in lengths]


def write_guessing(directory: Path, new_tokens: int = 32) -> None:
    """Writes the checkpoint; the draft has learned `new_tokens` tokens after each of `prompts`."""
    config = tiny_config(
        layers=5,
        hidden=128,
        intermediate=256,  # two processes share it in whole blocks
        experts=4,
        index_topk=16,
        dspark_stages=3,
        dspark_taps=(0, 2, 3),
        dspark_rank=VOCAB_SIZE,
    )
    write_tiny(directory, config, seed=2)
    torch.set_num_threads(1)
    model = DeepseekV4(Geometry.from_dir(directory), Precision.EXACT, parts="backbone")
    load_checkpoint(model, directory)
    follower = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
    for prompt, after in zip(prompts(), Engine(model).generate(prompts(), new_tokens)):
        tokens = [prompt[-1], *after]
        for token, following in zip(tokens, tokens[1:]):
            follower[:, token] = 0
            follower[following, token] = CERTAIN
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["mtp.2.markov_head.markov_w1.weight"] = torch.eye(VOCAB_SIZE, dtype=torch.bfloat16)
    tensors["mtp.2.markov_head.markov_w2.weight"] = follower.bfloat16()
    save_file(tensors, file)
