"""Checkpoints for tests of the gate: random ones with a text of their own, and the trained one
where it is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny

WORDS = """
    river stone lantern harvest window market garden winter shepherd letter copper
    bridge morning orchard candle valley anchor meadow thunder basket
    """.split()


@pytest.fixture(scope="session")
def text() -> str:
    """Some thousand words of our own, in lines."""
    draw = random.Random(5)
    return "\n".join(" ".join(draw.choice(WORDS) for _ in range(9)) for _ in range(400))


@pytest.fixture(scope="session")
def random_dir(tmp_path_factory, text) -> Path:
    """A checkpoint of random weights in the trained one's geometry, whose tokens are bytes; read
    only."""
    directory = tmp_path_factory.mktemp("gate") / "random"
    config = tiny_config(
        layers=3,
        hidden=128,
        experts=4,
        experts_per_token=2,
        heads=2,
        o_groups=2,
        intermediate=128,
        index_topk=8,
        compress_ratios=(0, 128, 4),
    )
    write_tiny(directory, config | {"hc_sinkhorn_iters": 2, "swiglu_limit": 2.0}, seed=4)
    (directory / "held_out.txt").write_text(text)
    return directory
