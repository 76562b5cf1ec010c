"""Fixtures that every test may use: the golden set and tiny checkpoints. Every test starts from the
same random state."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:  # a GPU machine that has what tests/gpu needs and no more
    pass
else:  # `--hypothesis-profile thorough`, for `make test-all`
    settings.register_profile("thorough", max_examples=3000)

DATA = Path(__file__).parent / "data"

# Its MLIR and that of the CUTLASS DSL, which SGLang's packages load, abort a process with both.
sys.modules["flydsl"] = None


@pytest.fixture(autouse=True)
def _same_start():
    """Small tensors are fastest on one thread, and its sums always have the same order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    # A test that had a flag set in this process must not leave what operators read of it.
    selection = sys.modules.get("dsv4_plugin.ops.operator")
    for operator in selection.OPERATORS.values() if selection else ():
        if operator.named:
            operator.configure()


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


def _released(name: str) -> dict:
    from dsv4_plugin.checkpoint.released import MODELS

    return json.loads((MODELS / f"{name}.json").read_text())


@pytest.fixture(scope="session", params=["pro", "flash"])
def released_config(request) -> dict:
    """config.json of a released model with an MTP block."""
    return _released(request.param)


@pytest.fixture(scope="session", params=["pro-0813", "flash-0731"])
def dspark_config(request) -> dict:
    """config.json of a released model with a DSpark draft."""
    return _released(request.param)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory) -> Path:
    """A tiny checkpoint in shards, with every kind of layer; read only."""
    from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny

    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_tiny(directory, tiny_config(hidden=128), seed=1, shard_bytes=3_000_000)
    return directory


@pytest.fixture(scope="session")
def dspark_dir(tmp_path_factory) -> Path:
    """A tiny checkpoint with a DSpark draft that does not read the last layers only; read only."""
    from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny

    directory = tmp_path_factory.mktemp("dspark") / "model"
    config = tiny_config(
        layers=5,
        hidden=128,
        intermediate=128,
        experts=4,
        index_topk=16,
        dspark_stages=3,
        dspark_taps=(0, 2, 3),
    )
    write_tiny(directory, config, seed=2)
    return directory
