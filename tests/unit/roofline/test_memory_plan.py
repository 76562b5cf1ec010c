"""The plan of memory against the modules that a process makes, and against sums done by hand."""

from __future__ import annotations

import json

import pytest

from dsv4_plugin.cache import layout as bytes_of
from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny
from dsv4_plugin.cli import main, serve
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.parallel import Group, Parallel
from dsv4_plugin.roofline.hardware import Hardware
from dsv4_plugin.roofline.layout import Layout, LayoutError
from dsv4_plugin.roofline.memory_plan import layouts_that_fit, memory_plan

PRO, FLASH = load_geometry("pro"), load_geometry("flash")
MI355X, H200 = Hardware.named("MI355X"), Hardware.named("H200")
GROUP_OF_PART = {
    "experts": "routed experts",
    "shared_experts": "shared expert",
    "compressor": "compressors and indexers",
    "indexer": "compressors and indexers",
    "attn": "attention",
    "embed": "embedding and head",
    "head": "embedding and head",
}
SMALL = ("q_norm", "kv_norm", "attn_sink")


def group_of_parameter(name: str) -> str:
    """Group of a parameter by its path alone, as a reader of the model would say it."""
    parts = name.split(".")
    if parts[0] == "mtp":
        return "draft"
    if not any(part in SMALL for part in parts):
        for part in ("experts", "shared_experts", "indexer", "compressor", "embed", "head", "attn"):
            if part in parts:
                return GROUP_OF_PART[part]
    return "routing, streams, norms"


@pytest.mark.parametrize(
    "geometry, gpus, ep",
    [(PRO, 8, 1), (PRO, 8, 8), (PRO, 4, 1), (FLASH, 1, 1), (FLASH, 8, 1)],
    ids=["pro-tp8", "pro-tp8-ep8", "pro-tp4", "flash-tp1", "flash-tp8"],
)
def test_the_weights_are_those_of_the_modules_a_process_makes(geometry, gpus, ep):
    tensor, expert = Group(size=gpus), Group(size=ep)
    share = Parallel(tensor, expert, Group(size=gpus // ep), tensor, tensor)
    model = DeepseekV4(geometry, Precision.SERVING, share, device="meta")
    held: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        group = group_of_parameter(name)
        held[group] = held.get(group, 0) + parameter.nbytes
    plan = memory_plan(geometry, Layout(gpus, 1, ep), MI355X.memory, draft=True)
    assert {name: round(size) for name, size in plan.weights.items()} == held


@pytest.mark.parametrize("precision", [Precision.SERVING, Precision.EXACT])
def test_the_weights_of_a_cpu_are_decoded_to_fp32(precision):
    geometry = Geometry.from_config(tiny_config())
    model = DeepseekV4(geometry, precision, device="cpu", parts="backbone")
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert memory_plan(geometry, Layout(1), 1e9, dense=4).weight_bytes == held


def test_a_token_costs_what_the_pages_of_a_pool_take():
    """Pools of two sizes differ by exactly the tokens between them; a tenth of the window slots of
    the engine's pool, which has one for every token."""
    geometry = Geometry.from_config(tiny_config(compress_ratios=[4, 128, 0, 4, 128, 0]))
    plan = memory_plan(geometry, Layout(1), 1e9)
    ratios = geometry.compress_ratios[: geometry.num_hidden_layers]
    four, long = ratios.count(4), ratios.count(128)
    window_page = len(ratios) * bytes_of.latent_page_bytes(256)
    rings = four * 8 * 4 * (2 * 2 * 512 + 2 * 2 * 128)
    entries = four * (
        bytes_of.latent_page_bytes(64) + 64 * 132
    ) + long * bytes_of.latent_page_bytes(2)
    assert plan.token * 256 == pytest.approx(0.1 * (window_page + rings) + entries, rel=1e-12)
    assert plan.request == long * 128 * 1024 * 4


def test_pro_by_hand():
    """584 bytes a latent, 132 an index key (docs/model.md §4); pages of c128 are padded from 1168
    to 1728 bytes, of c4 from 37376 to 37440, of the window from 149504 to 149760."""
    plan = memory_plan(PRO, Layout(8), MI355X.memory)
    window = 61 * 149760 / 256 + 30 * 8 * 4 * (2048 + 512) / 256
    token = 0.1 * window + 30 * (37440 / 256 + 132 / 4) + 31 * 1728 / 256
    assert plan.token == pytest.approx(token)
    state = 31 * 128 * 1024 * 4
    room = 0.9 * 288e9 - plan.weight_bytes - 257 * state
    assert plan.tokens == int(room / token) // 256 * 256 - 256
    assert plan.request_bytes(8192) == pytest.approx(state + 8192 * token)
    assert plan.weight_bytes / 1e9 == pytest.approx(109.5, abs=0.1)


def test_a_draft_costs_rings_windows_and_logits():
    """Rings of 16 and 256 rows, a window a stage, and the logits of six rows a request beside the
    five that were drafted."""
    geometry = load_geometry("pro-0813")
    plain = memory_plan(geometry, Layout(8), 288e9)
    drafting = memory_plan(geometry, Layout(8), 288e9, draft=True)
    assert drafting.request == 2 * plain.request
    more = 30 * 8 * 4 * 2560 / 256 + 3 * 149760 / 256
    assert drafting.token - plain.token == pytest.approx(0.1 * more)
    row = 256 * 129280 * 4
    assert drafting.workspace["logits"] == pytest.approx(6 * row / 8)
    assert drafting.workspace_bytes - plain.workspace_bytes == pytest.approx(5 * row / 8 + 5 * row)


@pytest.mark.parametrize(
    "layout, gpu, options, says",
    [
        (Layout(4), H200, {}, "215.4 GB of weights are more than the 126.9 GB"),
        (Layout(8), H200, {"requests": 1500}, "room for 0 cached tokens, not for 1,048,576"),
        (Layout(8), H200, {"fraction": 0.99}, "the largest step needs"),
    ],
)
def test_what_does_not_fit_is_said(layout, gpu, options, says):
    plan = memory_plan(PRO, layout, gpu.memory, **options)
    assert says in plan.lacking(1 << 20)


def test_layouts_that_fit():
    plan = memory_plan(PRO, Layout(4), H200.memory)
    assert layouts_that_fit(plan, PRO, 8192) == ["tp8"]  # sixteen ways cut a block of scales
    assert layouts_that_fit(memory_plan(FLASH, Layout(8), 288e9), FLASH, 8192) == [
        "tp1",
        "tp2",
        "tp4",
        "tp8",
    ]
    with pytest.raises(LayoutError, match="moe_intermediate_size 3072"):
        memory_plan(PRO, Layout(16), 288e9)


def test_the_command(capsys):
    assert main(["plan", "--gpu", "h200", "--tp", "4", "--context", "8192"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "Does not fit: 215.4 GB of weights" in text and "These layouts fit: tp8." in text
    assert main(["plan", "--json", "--context", "8192"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["total_weight_bytes"] == sum(figures["weight_bytes"].values())
    assert figures["lacking"] is None and figures["cached_tokens"] > 10e6
    assert main(["plan", "--tp", "3"]) == 2
    assert "parallel size 3 does not divide num_attention_heads 128" in capsys.readouterr().err


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """Parsed arguments of `dsv4 serve` for a tiny checkpoint."""
    import argparse

    write_tiny(tmp_path / "model", tiny_config())

    def parsed(*words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        serve.add_arguments(parser)
        arguments, arguments.other = parser.parse_known_args([str(tmp_path / "model"), *words])
        return arguments

    return parsed


def test_serve_says_three_lines(serving):
    weights, caches, step = serve.memory_lines(serving("--cpu", "--max-running-requests", "7"))
    assert weights.startswith("weights ") and "of this machine" in weights
    assert "16,384 tokens for 7 requests" in caches
    assert step.startswith("largest step ")


def test_serve_refuses_what_cannot_fit(serving, monkeypatch):
    from dsv4_plugin import device
    from dsv4_plugin.roofline.memory_plan import MemoryPlanError

    monkeypatch.setattr(device, "memory", lambda: 1 << 20)
    with pytest.raises(MemoryPlanError, match="of weights are more than the 0.9 MB"):
        serve.memory_lines(serving("--cpu"))
