"""The table of released names against figures published with the releases, and against a real
file."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from safetensors import safe_open

from dsv4_plugin.checkpoint.schema import DTYPE_BYTES, expected_tensors
from dsv4_plugin.config import Geometry

# Tensors and `metadata.total_size` (bytes of tensor data, headers excluded) of the released
# indexes, by hidden size.
PUBLISHED = {7168: (145116, 864_704_792_696), 4096: (69187, 159_609_485_896)}
PUBLISHED_FLASH_DTYPES = {
    "BF16": 433,
    "F32": 417,
    "F8_E4M3": 375,
    "F8_E8M0": 34167,
    "I64": 3,
    "I8": 33792,
}
# The releases with a DSpark draft: tensors and bytes of the whole index. The dtypes of the draft's
# tensors are those of Flash's shards as third parties read them; Pro's follow from its size.
PUBLISHED_DSPARK = {7168: (149782, 892_727_580_904), 4096: (72317, 166_878_536_440)}
DSPARK_DTYPES = {
    7168: {"I8": 3456, "F8_E4M3": 25, "F8_E8M0": 3481, "BF16": 20, "F32": 27},
    4096: {"I8": 2304, "F8_E4M3": 25, "F8_E8M0": 2329, "BF16": 20, "F32": 27},
}
DSPARK_BYTES = {7168: 41_979_375_900, 4096: 10_862_838_300}


def test_totals_are_the_published_ones(released_config):
    tensors = expected_tensors(Geometry.from_config(released_config))
    assert (len(tensors), sum(spec.nbytes for spec in tensors.values())) == PUBLISHED[
        released_config["hidden_size"]
    ]


def test_dtypes_are_the_published_ones(released_config):
    tensors = expected_tensors(Geometry.from_config(released_config))
    if released_config["hidden_size"] == 4096:
        assert Counter(spec.dtype for spec in tensors.values()) == PUBLISHED_FLASH_DTYPES
    assert {spec.dtype for spec in tensors.values()} <= set(DTYPE_BYTES)


def test_totals_with_a_dspark_draft_are_the_published_ones(dspark_config):
    tensors = expected_tensors(Geometry.from_config(dspark_config))
    size = dspark_config["hidden_size"]
    assert (len(tensors), sum(spec.nbytes for spec in tensors.values())) == PUBLISHED_DSPARK[size]
    drafting = [spec for name, spec in tensors.items() if name.startswith("mtp.")]
    assert Counter(spec.dtype for spec in drafting) == DSPARK_DTYPES[size]
    assert sum(spec.nbytes for spec in drafting) == DSPARK_BYTES[size]


def test_the_backbone_is_the_same_with_either_draft(dspark_config):
    geometry = Geometry.from_config(dspark_config)
    older = replace(
        geometry,
        dspark=None,
        num_nextn_predict_layers=1,
        compress_ratios=geometry.compress_ratios[: geometry.num_hidden_layers + 1],
    )
    backbones = [
        {name: spec for name, spec in expected_tensors(each).items() if name[:4] != "mtp."}
        for each in (geometry, older)
    ]
    assert backbones[0] == backbones[1]
    size = geometry.hidden_size
    assert sum(spec.nbytes for spec in backbones[0].values()) == (
        PUBLISHED_DSPARK[size][1] - DSPARK_BYTES[size]
    )


def test_stages_of_a_dspark_draft(dspark_config):
    tensors = expected_tensors(Geometry.from_config(dspark_config))
    size, rank = dspark_config["hidden_size"], dspark_config["dspark_markov_rank"]
    for name, stages in (
        ("main_proj.weight", {0}),
        ("main_proj.scale", {0}),
        ("main_norm.weight", {0}),
        ("norm.weight", {2}),
        ("hc_head_fn", {2}),
        ("markov_head.markov_w1.weight", {2}),
        ("markov_head.markov_w2.weight", {2}),
        ("confidence_head.proj.weight", {2}),
        ("attn.attn_sink", {0, 1, 2}),
        ("ffn.gate.bias", {0, 1, 2}),
        ("ffn.gate.tid2eid", set()),
        ("e_proj.weight", set()),
        ("enorm.weight", set()),
    ):
        assert {stage for stage in range(3) if f"mtp.{stage}.{name}" in tensors} == stages, name
    assert tensors["mtp.0.main_proj.weight"].shape == (size, 3 * size)
    assert tensors["mtp.2.confidence_head.proj.weight"].shape == (1, size + rank)
    assert tensors["mtp.2.markov_head.markov_w2.weight"].shape == (129280, rank)
    assert tensors["mtp.2.markov_head.markov_w2.weight"].shard == tensors["head.weight"].shard
    assert tensors["mtp.2.markov_head.markov_w1.weight"].shard is None


def test_a_real_file_holds_exactly_the_table(golden_dir, golden_geometry):
    with safe_open(golden_dir / "model.safetensors", framework="np") as file:
        held = {
            name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
            for name in file.keys()
        }
    assert {
        name: (spec.dtype, spec.shape) for name, spec in expected_tensors(golden_geometry).items()
    } == held


def test_base_releases(golden_geometry):
    tensors = expected_tensors(replace(golden_geometry, expert_dtype="fp8"))
    assert len(tensors) == len(expected_tensors(golden_geometry))
    weight, scale = (tensors[f"layers.4.ffn.experts.7.w2.{half}"] for half in ("weight", "scale"))
    assert (weight.dtype, weight.shape) == ("F8_E4M3", (128, 256))
    assert (scale.dtype, scale.shape) == ("F32", (1, 2))
    assert tensors["layers.0.attn.wq_a.scale"].dtype == "F32"
    assert "I8" not in {spec.dtype for spec in tensors.values()}


def test_parts_follow_the_layer(golden_geometry):
    names = set(expected_tensors(golden_geometry))
    for layer, ratio in enumerate(golden_geometry.compress_ratios[:5]):
        prefix = f"layers.{layer}."
        assert (prefix + "attn.compressor.ape" in names) == (ratio != 0)
        assert (prefix + "attn.indexer.wq_b.weight" in names) == (ratio == 4)
        assert (prefix + "ffn.gate.tid2eid" in names) == (layer < 3)
        assert (prefix + "ffn.gate.bias" in names) == (layer >= 3)
    assert {"mtp.0.e_proj.weight", "mtp.0.hc_head_fn", "mtp.0.ffn.gate.bias"} <= names
    assert not any(
        name.startswith("mtp.")
        for name in expected_tensors(
            replace(
                golden_geometry,
                num_nextn_predict_layers=0,
                compress_ratios=golden_geometry.compress_ratios[:5],
            )
        )
    )


@pytest.mark.parametrize(
    "name, group, axis",
    [
        ("embed.weight", "vocab", 0),
        ("layers.0.attn.wq_b.weight", "attention", 0),
        ("layers.0.attn.wq_b.scale", "attention", 0),
        ("layers.0.attn.wo_a.weight", "attention", 0),
        ("layers.0.attn.wo_b.scale", "attention", 1),
        ("layers.0.attn.attn_sink", "attention", 0),
        ("layers.0.ffn.experts.3.w1.weight", "expert_tensor", 0),
        ("layers.0.ffn.experts.3.w2.scale", "expert_tensor", 1),
        ("layers.0.ffn.shared_experts.w3.weight", "shared", 0),
    ],
)
def test_how_tensors_are_split(golden_geometry, name, group, axis):
    shard = expected_tensors(golden_geometry)[name].shard
    assert (shard.group, shard.axis) == (group, axis)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attn.wq_a.weight",
        "layers.0.attn.wkv.weight",
        "layers.2.attn.indexer.wq_b.weight",
        "layers.3.attn.compressor.wkv.weight",
        "layers.0.ffn.gate.weight",
        "layers.0.hc_attn_fn",
    ],
)
def test_what_every_process_holds_whole(golden_geometry, name):
    assert expected_tensors(golden_geometry)[name].shard is None
