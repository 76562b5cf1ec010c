"""Writes what `train.py` learned as a checkpoint in the released format, with the text it never
saw.

    python examples/train_tiny/export.py STATE_DIR CHECKPOINT_DIR
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from geometry import config
from text import corpus
from torch import Tensor

from dsv4_plugin.checkpoint.schema import expected_tensors
from dsv4_plugin.checkpoint.tiny import write_checkpoint
from dsv4_plugin.config import Geometry
from dsv4_plugin.formats import quantize_weight_fp4, quantize_weight_fp8

HELD_OUT = "held_out.txt"
KEPT_CHARACTERS = 60_000
"""Of the held-out text, for whoever measures the checkpoint."""


def released(geometry: Geometry, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every released tensor of `weights`, by the names of the model's parameters, quantised as a
    release stores it."""
    quantize = {"F8_E4M3": quantize_weight_fp8, "I8": quantize_weight_fp4}
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
    for name, spec in expected_tensors(geometry).items():
        if spec.weight is not None:
            continue
        if spec.expert is None:
            value = weights[name]
        else:
            prefix, matrix = name.split(f"experts.{spec.expert}.")
            value = weights[f"{prefix}experts.{matrix}"][spec.expert]
        if spec.scale is None:
            yield name, value.to(dtypes[spec.dtype]).contiguous()
        else:
            weight, scale = quantize[spec.dtype](value)
            yield name, weight
            yield spec.scale, scale


def export(state: Path, checkpoint: Path) -> None:
    """Writes `checkpoint`, each file in place of an earlier one; what else is there, the model
    card, stays."""
    weights = torch.load(state / "state.pt", weights_only=True)["model"]
    _, held_out = corpus()

    def tokenizer(directory: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(state / name, directory / name)

    checkpoint.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as scratch:
        fresh = Path(scratch) / checkpoint.name
        write_checkpoint(
            fresh, config(), released(Geometry.from_config(config()), weights), tokenizer
        )
        (fresh / HELD_OUT).write_text(held_out[:KEPT_CHARACTERS])
        for path in fresh.iterdir():
            os.replace(path, checkpoint / path.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("state", type=Path)
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    export(arguments.state, arguments.checkpoint)
