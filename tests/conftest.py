"""Fixtures that every test may use: the golden set and tiny checkpoints. Every test starts from the
same random state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _same_start():
    """Small tensors are fastest on one thread, and its sums always have the same order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Model directory of the golden set; `golden.safetensors` beside the weights holds the
    answers."""
    return DATA / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir):
    """Tensors of the golden answers, by name (tests/data/golden/README.md)."""
    from safetensors.torch import load_file

    return load_file(golden_dir / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_geometry(golden_dir):
    from dsv4_plugin.config import Geometry

    return Geometry.from_dir(golden_dir)


@pytest.fixture(scope="session", params=["pro", "flash"])
def released_config(request) -> dict:
    """config.json of a released model."""
    from dsv4_plugin.checkpoint.released import MODELS

    return json.loads((MODELS / f"{request.param}.json").read_text())


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A tiny checkpoint in shards, with every kind of layer; read only."""
    from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny

    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_tiny(directory, tiny_config(hidden=128), seed=1, shard_bytes=3_000_000)
    return directory
