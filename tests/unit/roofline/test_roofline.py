"""Byte, FLOP and time totals against docs/model.md §1, §2 and §5, which were computed apart from
this code."""

import dataclasses
import math

import pytest

from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.config import ConfigError, Geometry
from dsv4_plugin.roofline.assumptions import AssumptionError, parse
from dsv4_plugin.roofline.hardware import Hardware, HardwareError
from dsv4_plugin.roofline.layout import Layout, LayoutError
from dsv4_plugin.roofline.memory import cached_bytes, largest_batch, resident
from dsv4_plugin.roofline.step import Efficiency, decode_step, prefill_step
from dsv4_plugin.roofline.weights import component_bytes, holdings

MI355X = Hardware.named("MI355X")
PRO, FLASH = load_geometry("pro"), load_geometry("flash")
TP8 = Layout(8)


def flops(step):
    return {component.name: sum(component.flops.values()) for component in step.components}


def printed(value, digits):
    """How a table with so many significant digits prints a value."""
    return float(f"{value:.{digits}g}")


@pytest.mark.parametrize(
    "geometry, backbone, mtp, size, tensors",
    [(PRO, 1573.0, 25.8, 864_704_792_696, 145_116), (FLASH, 284.3, 6.6, 159_609_485_896, 69_187)],
)
def test_parameters_bytes_and_tensors_of_the_released_checkpoints(
    geometry, backbone, mtp, size, tensors
):
    found = holdings(geometry)
    assert round(sum(h.elements for h in found if not h.mtp) / 1e9, 1) == backbone
    assert round(sum(h.elements for h in found if h.mtp) / 1e9, 1) == mtp
    assert sum(h.bytes for h in found) == size
    assert sum(h.tensors for h in found) == tensors


@pytest.mark.parametrize("geometry, active", [(PRO, 49.8), (FLASH, 13.8)])
def test_active_parameters(geometry, active):
    share = geometry.num_experts_per_tok / geometry.n_routed_experts
    counted = sum(
        h.elements * (share if h.component == "routed_experts" else 1)
        for h in holdings(geometry)
        if not h.mtp
    )
    assert round(counted / 1e9, 1) == active


def test_bytes_by_group_of_pro():
    by = component_bytes(PRO)
    attention = sum(by[name] for name in ("wq_a_wkv", "wq_b", "wo_a", "wo_b"))
    assert printed(by["routed_experts"] / 1e9, 4) == 822.1
    assert printed(attention / 1e9, 3) == 18.3
    assert printed(by["shared_expert"] / 1e9, 2) == 4.0
    assert printed((by["embedding"] + by["head"]) / 1e9, 2) == 3.7
    # "compressors" of the table are the main ones and "indexers" hold theirs: 1.35 and 0.63.
    assert by["compressor"] / 1e9 == pytest.approx(1.35, abs=0.01)
    assert printed((by["indexer"] + by["indexer_compressor"]) / 1e9, 2) == 0.63
    assert by["gate"] / 1e9 + by["tid2eid"] / 1e9 == pytest.approx(0.36, abs=0.01)
    assert printed(by["mhc"] / 1e9, 2) == 0.34
    assert printed(sum(h.bytes for h in holdings(PRO) if h.mtp) / 1e9, 3) == 14.0


@pytest.mark.parametrize("geometry, gigabytes", [(PRO, 109.4), (FLASH, 20.6)])
def test_resident_weights_per_gpu(geometry, gigabytes):
    assert resident(geometry, TP8) / 1e9 == pytest.approx(gigabytes, abs=0.1)


@pytest.mark.parametrize(
    "context, milliseconds",
    [
        (8192, (1.01, 2.38, 6.10, 12.8, 17.0)),
        (131072, (1.03, 2.52, 6.66, 15.0, 25.9)),
        (1048576, (1.16, 3.56, 10.8, 31.6, 92.4)),
    ],
)
def test_memory_bound_of_a_decode_step(context, milliseconds):
    for batch, expected in zip((1, 8, 32, 128, 512), milliseconds):
        assert (
            printed(1e3 * decode_step(PRO, MI355X, TP8, batch, context).memory_seconds, 3)
            == expected
        )


def test_expert_bytes_dominate_at_batch_32():
    step = decode_step(PRO, MI355X, TP8, 32, 8192)
    experts = next(c.bytes for c in step.components if c.name == "routed_experts")
    assert printed(experts / 1e9, 3) == 40.7
    assert printed(sum(c.bytes for c in step.components) / 1e9, 3) == 48.8


@pytest.mark.parametrize(
    "geometry, totals", [(PRO, (109, 114, 132, 303)), (FLASH, (29, 32, 43, 140))]
)
def test_flop_per_token(geometry, totals):
    for context, expected in zip((4096, 32768, 131072, 1048576), totals):
        step = decode_step(geometry, MI355X, Layout(1), 1, context)
        assert round(sum(flops(step).values()) / 1e9) == expected


def test_flop_per_token_by_part():
    at = {
        context: flops(decode_step(PRO, MI355X, Layout(1), 1, context))
        for context in (4096, 32768, 131072, 1048576)
    }
    parts = at[4096]
    rows = {
        "wq_a_wkv wq_b wo_b": 28.4,
        "wo_a": 8.2,
        "compressor indexer_compressor": 1.6,
        "indexer": 0.8,
        "routed_experts": 48.4,
        "shared_expert": 8.1,
        "gate": 0.3,
        "mhc": 0.2,
        "head": 1.9,
    }
    for names, expected in rows.items():
        assert round(sum(parts[name] for name in names.split()) / 1e9, 1) == expected
    for context, scores, core in (
        (4096, 0.5, 10.4),
        (32768, 4.0, 12.2),
        (131072, 16.1, 18.4),
        (1048576, 128.8, 76.7),
    ):
        # The table rounds once; adding its three rounded rows may differ by one in the last place.
        assert at[context]["index_scan"] / 1e9 == pytest.approx(scores, abs=0.06)
        found = sum(at[context][name] for name in ("window", "selected", "compressed_128"))
        assert found / 1e9 == pytest.approx(core, abs=0.06)


def test_prefill_nanoseconds_per_token():
    """The table's rates are 5 PFLOP/s FP8 and 2.5 bf16, and its wo_a runs in bf16; ours runs in FP8
    as SGLang serves it."""
    hardware = dataclasses.replace(MI355X, flops={"fp8": 5e15, "bf16": 2.5e15})
    for length, core, scores, total in (
        (4096, 310, 50, 4.2),
        (32768, 532, 403, 4.8),
        (131072, 707, 1611, 6.1),
        (1048576, 2168, 12885, 18.9),
    ):
        step = prefill_step(PRO, hardware, TP8, 1, length)
        ns = {c.name: 1e9 * c.compute_seconds(hardware) / length for c in step.components}
        assert sum(ns[name] for name in ("window", "selected", "compressed_128")) == pytest.approx(
            core, abs=1
        )
        assert ns["index_scan"] == pytest.approx(scores, abs=1)
        ns["wo_a"] *= 2
        assert sum(ns.values()) / 1e3 == pytest.approx(total, abs=0.06)
    assert ns["wq_a_wkv"] + ns["wq_b"] + ns["wo_b"] == pytest.approx(1023, abs=1)
    for name, expected in (
        ("wo_a", 409),
        ("indexer", 157),
        ("routed_experts", 1209),
        ("shared_expert", 202),
        ("gate", 134),
        ("mhc", 67),
    ):
        assert ns[name] == pytest.approx(expected, abs=1)
    assert ns["compressor"] + ns["indexer_compressor"] == pytest.approx(622, abs=1)


@pytest.mark.parametrize(
    "geometry, growth, window, ring", [(PRO, 5511, 4.35, 17.8), (FLASH, 3850, 3.07, 11.6)]
)
def test_cache_of_a_request(geometry, growth, window, ring):
    """docs/model.md §4: bytes per token, then MiB of window and of compressor state."""
    assert (cached_bytes(geometry, 2 << 20) - cached_bytes(geometry, 1 << 20)) / (
        1 << 20
    ) == pytest.approx(growth, abs=1)
    fixed = (
        cached_bytes(geometry, 4096)
        - 4096 * (cached_bytes(geometry, 8192) - cached_bytes(geometry, 4096)) / 4096
    ) / 2**20
    assert fixed == pytest.approx(window + ring, abs=0.1)


def test_cached_tokens_that_fit_beside_pro():
    """docs/model.md §5: about 26 M tokens of history in what 90 % of 288 GB leaves. Requests carry
    windows and state besides."""
    requests = largest_batch(PRO, MI355X, TP8, 1 << 20)
    assert requests * (1 << 20) == pytest.approx(26e6, rel=0.05)


def test_components_add_up_and_peaks_bound_them():
    step = decode_step(PRO, MI355X, Layout(8, dp=8), 64, 8192)
    assert sum(step.by_kind().values()) == pytest.approx(step.seconds, rel=1e-12)
    assert step.seconds > step.memory_seconds
    assert step.under(Efficiency(bandwidth=0.5)).seconds > step.seconds
    assert step.under(Efficiency(launch=0.0)).by_kind()["launches"] == 0


def test_attention_groups_hold_whole_heads_and_divide_the_caches():
    tensor, data = (decode_step(PRO, MI355X, layout, 64, 8192) for layout in (TP8, Layout(8, dp=8)))

    def of(step, name):
        return next(c for c in step.components if c.name == name)

    assert of(data, "wq_b").bytes == 8 * of(tensor, "wq_b").bytes
    assert 8 * of(data, "selected").bytes == of(tensor, "selected").bytes
    assert of(data, "routed_experts").bytes == of(tensor, "routed_experts").bytes
    assert sum(flops(data).values()) == pytest.approx(
        sum(flops(tensor).values())
        - sum(
            7 / 8 * flops(tensor)[name]
            for name in (
                "wq_a_wkv",
                "compressor",
                "indexer_compressor",
                "indexer",
                "gate",
                "mhc",
                "index_scan",
            )
        )
    )


def test_fp8_experts_cost_nearly_twice_the_bytes():
    stored = component_bytes(dataclasses.replace(PRO, expert_dtype="fp8"))["routed_experts"]
    # FP4: half a byte and 1/32 of scale; FP8 base: a byte and 4/16384.
    assert stored / component_bytes(PRO)["routed_experts"] == pytest.approx(
        (1 + 4 / 128**2) / (0.5 + 1 / 32), rel=1e-9
    )


def test_shipped_geometries_are_the_released_ones(released_config):
    name = "pro" if released_config["hidden_size"] == PRO.hidden_size else "flash"
    assert load_geometry(name) == Geometry.from_config(released_config)


@pytest.mark.parametrize(
    "text, layout",
    [
        ("tp8", Layout(8)),
        ("tp1", Layout(1)),
        ("dp8", Layout(8, 8)),
        ("dp8-ep8", Layout(8, 8, 8)),
        ("dp4/8", Layout(8, 4)),
        ("tp8-ep8", Layout(8, 1, 8)),
    ],
)
def test_layout_names(text, layout):
    assert Layout.parse(text) == layout


@pytest.mark.parametrize("text", ["", "tp", "tp0", "xp8", "tp8/2", "dp8-tp8", "tp-8", "dp8-ep"])
def test_a_wrong_layout_is_named(text):
    with pytest.raises(LayoutError, match="is not understood"):
        Layout.parse(text)


@pytest.mark.parametrize(
    "layout, message",
    [
        (Layout(3), "num_attention_heads 128"),
        (Layout(8, 3), "do not divide 8 GPUs"),
        (Layout(8, 8, 4), "ep is 4"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout, message):
    with pytest.raises(LayoutError, match=message):
        decode_step(PRO, MI355X, layout, 1, 8192)


def test_wrong_names_are_errors(tmp_path):
    with pytest.raises(HardwareError, match="MI300X, MI325X, MI355X"):
        Hardware.named("MI999")
    with pytest.raises(
        ConfigError, match="neither flash nor flash-0731 nor pro nor pro-0813 nor the path"
    ):
        load_geometry("huge")
    with pytest.raises(LayoutError, match="index_dtype is 'fp2'"):
        decode_step(PRO, MI355X, TP8, 1, 8192, "fp2")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_geometry(str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["MI300X", "MI325X", "MI355X", "B200", "B300", "H200"])
def test_every_gpu_bounds_both_models(name):
    hardware = Hardware.named(name)
    for geometry in (PRO, FLASH):
        assert (
            0
            < decode_step(geometry, hardware, TP8, 1, 8192).seconds
            < prefill_step(geometry, hardware, TP8, 1, 8192).seconds
            < math.inf
        )


def test_what_if():
    assert parse("") == Efficiency()
    assert parse("bandwidth=0.6,launch_us=5") == Efficiency(bandwidth=0.6, launch=5e-6)
    for text, message in (
        ("bandwith=1", "did you mean bandwidth"),
        ("zebra=1", "there are bandwidth"),
        ("compute=fast", "is not a number"),
        ("compute=0", "above 0"),
        ("link=-1", "above 0"),
        ("link=inf", "finite"),
        ("launch_us", "is not a number"),
    ):
        with pytest.raises(AssumptionError, match=message):
            parse(text)


def component(step, name):
    return next(each for each in step.components if each.name == name)


def test_launches_of_a_step_by_hand():
    """Pro has 61 blocks of 7 + 2 + 2 + 7 kernels, 61 compressors of 2, and 30 indexers of 7."""
    step = decode_step(PRO, MI355X, TP8, 64, 8192)
    assert component(step, "kernels").launches == 61 * 18 + 61 * 2 + 30 * 7 == 1430
    # and on the links an all-reduce after attention and one after the experts
    assert component(step, "attention_reduce").launches == 61
    assert component(step, "expert_exchange").launches == 61


def test_traffic_of_tensor_parallel_ranks_by_hand():
    """64 tokens of 7168 bf16: an all-reduce over 8 sends 2 * 7/8 of the 917,504 bytes."""
    step = decode_step(PRO, MI355X, TP8, 64, 8192)
    for name in ("attention_reduce", "expert_exchange"):
        assert component(step, name).link_bytes == pytest.approx(61 * 1_605_632)


def test_traffic_of_expert_parallel_ranks_by_hand():
    """64 tokens on 8 ranks are 8 a rank. A token's 6 experts miss a given rank with (7/8)^6 =
    0.448795, so it goes to 7 * 0.551205 = 3.858433 others: 7168 bytes there in FP8 and 14336 back
    in bf16. 8 * 3.858433 * 21504 = 663,774.1 bytes a layer. Attention sends nothing."""
    step = decode_step(PRO, MI355X, Layout(8, dp=8, ep=8), 64, 8192)
    exchange = component(step, "expert_exchange")
    assert exchange.link_bytes == pytest.approx(61 * 663_774.1, rel=1e-6)
    assert exchange.launches == 2 * 61
    assert not [each for each in step.components if each.name == "attention_reduce"]


def test_traffic_of_attention_groups_by_hand():
    """Four groups of two: 16 tokens a group, 2 * 1/2 of their 229,376 bytes within it."""
    step = decode_step(PRO, MI355X, Layout(8, dp=4), 64, 8192)
    assert component(step, "attention_reduce").link_bytes == pytest.approx(61 * 229_376)
