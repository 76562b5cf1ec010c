"""Models and engines for tests of the runtime."""

from __future__ import annotations

import functools
from importlib import import_module

import pytest

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.runtime import Engine

from .rows_alike import RowsAlike


@pytest.fixture
def rows_alike(monkeypatch):
    # Small blocks of gathered latents: in float64, pages of fresh memory cost more than the
    # arithmetic.
    monkeypatch.setattr(import_module("dsv4_plugin.ops.sparse_mla"), "_MAX_GATHERED", 1 << 19)
    with RowsAlike():
        yield


def load(directory, precision: Precision) -> DeepseekV4:
    model = DeepseekV4(Geometry.from_dir(directory), precision)
    load_checkpoint(model, directory)
    return model


@pytest.fixture(scope="session")
def golden_model(golden_dir):
    """The golden model in a precision, loaded once: golden_model("exact")."""
    return functools.cache(lambda precision: load(golden_dir, Precision(precision)))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A model of three narrow layers, one of each kind, that selects 8 of its entries:
    small_model("exact")."""
    directory = tmp_path_factory.mktemp("small") / "model"
    config = tiny_config(
        layers=3,
        hidden=128,
        experts=4,
        experts_per_token=2,
        heads=2,
        o_groups=2,
        intermediate=128,
        index_topk=8,
        compress_ratios=[4, 128, 0],
        mtp_blocks=0,
    )
    write_tiny(directory, config | {"hc_sinkhorn_iters": 2}, seed=3)
    return functools.cache(lambda precision: load(directory, Precision(precision)))


@pytest.fixture
def small_engine(small_model):
    """Engines of the small model with pools of their own: small_engine("exact", page_seed=1)."""
    return lambda precision, page_seed=None: Engine(
        small_model(precision), max_tokens=6144, max_requests=12, page_seed=page_seed
    )
