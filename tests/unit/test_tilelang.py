"""Where TileLang's kernels are chosen, and why they are not."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin import device, flags
from dsv4_plugin.cache import DenseIndexCache, PackedIndexCache, index_page_bytes
from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.ops import operator as selection
from dsv4_plugin.ops.operator import OPERATORS, SelectionError
from dsv4_plugin.runtime import precompile

OFFERED = [name for name, each in OPERATORS.items() if "tilelang" in each.implementations]
DATES = ["2026-05-02", "2026-05-04", "2026-05-10", "2026-05-21"]
OF_THE_BRANCH = {
    "2026-05-02": {"indexer_logits", "sparse_mla"},
    "2026-05-04": {"indexer_logits", "sparse_mla", "mhc_post"},
    "2026-05-10": {"indexer_logits", "sparse_mla"},
    "2026-05-21": {"indexer_logits"},
}
"""Operators that the side branch ran in TileLang at each milestone."""


@pytest.fixture
def chip(monkeypatch):
    """Takes this process for one with a GPU of that name and TileLang of that version."""

    def pretend(arch: str, version: str | None = "0.1.12") -> None:
        found = device.package_version
        monkeypatch.setattr(device, "arch", lambda: arch)
        monkeypatch.setattr(
            device, "package_version", lambda name: version if name == "tilelang" else found(name)
        )

    yield pretend
    monkeypatch.undo()
    selection.configure()


@pytest.mark.parametrize("operator", OFFERED)
@pytest.mark.parametrize(
    ("arch", "version", "why"),
    [
        ("gfx90a", "0.1.12", "gfx90a is not one of gfx950"),
        ("gfx950", None, "package tilelang is not installed"),
        ("gfx950", "0.1.13", "package tilelang is 0.1.13, not 0.1.12 (pip install tilelang=="),
        ("cpu", "0.1.12", "there is no GPU"),
    ],
)
def test_what_this_machine_lacks_is_said_at_the_start(
    operator, arch, version, why, chip, monkeypatch
):
    chip(arch, version)
    monkeypatch.setenv(flags.operator_flag(operator), "tilelang")
    with pytest.raises(SelectionError) as error:
        OPERATORS[operator].configure()
    assert f"{flags.operator_flag(operator)}=tilelang cannot run here: {why}" in str(error.value)


def test_calls_that_the_indexer_refuses():
    requires = OPERATORS["indexer_logits"].implementations["tilelang"].requires
    packed = PackedIndexCache(torch.zeros(2, index_page_bytes(), dtype=torch.uint8))
    q = torch.zeros(1, 64, 128)
    assert requires(q, None, DenseIndexCache(4, False), None) == (
        "the index cache is a DenseIndexCache, not packed"
    )
    assert requires(q, None, packed, None) == "q is torch.float32, not float8_e4m3fn"
    assert requires(q.to(torch.float8_e4m3fn), None, packed, None) is None


def test_calls_that_hyper_connections_refuse():
    pre, post = (
        OPERATORS[name].implementations["tilelang"].requires for name in ("mhc_pre", "mhc_post")
    )
    streams = torch.zeros(1, 4, 256, dtype=torch.bfloat16)
    assert pre(streams) is None and post(streams[:, 0], streams) is None
    assert pre(streams.float()) == "the streams are torch.float32, not bfloat16"
    assert post(streams[:, 0], streams[:, :3]) == "there are 3 streams, not 4"
    assert pre(streams[..., :200]) == "200 channels are no multiple of 128"


@pytest.mark.parametrize("operator", ["mhc_pre", "mhc_post", "sparse_mla"])
def test_what_was_not_executed_on_gfx942_is_refused(operator, chip, monkeypatch):
    """Nothing of them was executed as its code."""
    chip("gfx942")
    monkeypatch.setenv(flags.operator_flag(operator), "tilelang")
    with pytest.raises(SelectionError, match="gfx942 is not one of gfx950, sm_90"):
        OPERATORS[operator].configure()


@pytest.mark.parametrize("operator", OFFERED)
def test_auto_takes_it_only_where_it_was_timed(operator, chip, monkeypatch):
    """Whatever else refuses, auto does not take what nobody has measured."""
    chip("gfx950")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    each = OPERATORS[operator]
    each.configure()
    only = {"tilelang": each.implementations["tilelang"]}
    monkeypatch.setattr(each, "implementations", only)
    choice = each._choose(True, torch.zeros(1), (torch.zeros(1),), {})
    assert choice.implementation == "reference"
    assert "its speed is not known here" in choice.rejected["tilelang"]


@pytest.mark.parametrize("date", DATES)
def test_milestones_run_what_the_side_branch_ran(date, chip, monkeypatch):
    """On a gfx950 that is not there, every operator that ran in TileLang then does so now; where
    TileLang is missing auto decides, and says so."""
    monkeypatch.setenv("DSV4_PROFILE", date)
    chip("gfx950")
    selection.configure()
    chosen = {name for name, each in OPERATORS.items() if each._forced.value == "tilelang"}
    assert chosen == OF_THE_BRANCH[date]


def test_a_milestone_without_tilelang_is_auto(chip, monkeypatch, caplog):
    monkeypatch.setenv("DSV4_PROFILE", "2026-05-02")
    chip("gfx950", None)
    with caplog.at_level("WARNING"):
        selection.configure()
    assert OPERATORS["indexer_logits"]._forced.value == "auto"
    assert "package tilelang is not installed; auto decides" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "operator"),
    [
        ("SGLANG_OPT_USE_TILELANG_INDEXER", "1", "indexer_logits"),
        ("SGLANG_OPT_USE_TILELANG_MHC_PRE", "true", "mhc_pre"),
        ("SGLANG_OPT_USE_TILELANG_MHC_POST", "1", "mhc_post"),
        ("SGLANG_HACK_FLASHMLA_BACKEND", "tilelang", "sparse_mla"),
    ],
)
def test_variables_of_the_side_branch_choose_it(variable, value, operator, chip, monkeypatch):
    monkeypatch.setenv(variable, value)
    chip("gfx950")
    OPERATORS[operator].configure()
    assert OPERATORS[operator]._forced.value == "tilelang" and OPERATORS[operator].named


def test_a_build_meets_the_variants_of_a_server(monkeypatch):
    """So none is compiled at the first request; on a chip that is not there, with no tensor of the
    model but its shapes."""
    pytest.importorskip("tilelang")
    for name in ("INDEXER_LOGITS", "MHC_PRE", "MHC_POST", "SPARSE_MLA"):
        monkeypatch.setenv(f"DSV4_{name}", "tilelang")
    met = []
    geometry = load_geometry("pro")
    precompile._each_variant(
        geometry,
        precompile.share(geometry, 8, 1),
        "gfx950",
        precompile.Load(chunk=4, requests=2, context=1024),
        lambda *args, **kwargs: None,
        lambda variant: met.append((variant.name, dict(variant.arguments).get("heads"))),
    )
    assert sorted(met, key=str) == [
        ("indexer_logits_direct", 64),
        ("mhc_finish_kernel", None),
        ("mhc_post_kernel", None),
        ("mhc_project_kernel", None),
        ("sparse_mla_attend_kernel", 16),
        ("sparse_mla_combine_kernel", 16),
    ]
