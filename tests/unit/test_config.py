"""Geometry from config.json, and the one clear error for each kind of wrong config."""

from __future__ import annotations

import copy
import json

import pytest

from dsv4_plugin.config import ConfigError, DSpark, Geometry


def test_released_sizes(released_config):
    geometry = Geometry.from_config(released_config)
    ratios = geometry.compress_ratios[: geometry.num_hidden_layers]
    pro = geometry.hidden_size == 7168
    assert [ratios.count(ratio) for ratio in (4, 128, 0)] == ([30, 31, 0] if pro else [21, 20, 2])
    assert geometry.compress_ratios[geometry.num_hidden_layers :] == (0,)
    assert geometry.num_layers == len(geometry.compress_ratios)
    assert geometry.nope_head_dim == 448
    assert geometry.softmax_scale == pytest.approx(1 / 512**0.5)
    assert [geometry.is_hash_routed(layer) for layer in range(5)] == [True] * 3 + [False] * 2
    assert (geometry.rope_theta, geometry.compress_rope_theta, geometry.yarn.factor) == (
        10000,
        160000,
        16,
    )


def test_constants_come_from_the_file(golden_dir):
    config = json.loads((golden_dir / "config.json").read_text())
    config |= {
        "hc_eps": 1e-5,
        "rms_norm_eps": 1e-4,
        "hc_sinkhorn_iters": 7,
        "swiglu_limit": 3.0,
        "expert_dtype": "fp8",
    }
    geometry = Geometry.from_config(config)
    assert (geometry.hc_eps, geometry.rms_norm_eps, geometry.hc_sinkhorn_iters) == (1e-5, 1e-4, 7)
    assert (geometry.swiglu_limit, geometry.expert_dtype) == (3.0, "fp8")


def test_released_dspark_drafts(dspark_config):
    geometry = Geometry.from_config(dspark_config)
    pro = geometry.hidden_size == 7168
    # num_nextn_predict_layers is 1 in these files, and no such block is in the weights.
    assert dspark_config["num_nextn_predict_layers"] == 1
    assert (geometry.num_nextn_predict_layers, geometry.num_draft_blocks) == (0, 3)
    assert geometry.num_layers == len(geometry.compress_ratios) == (64 if pro else 46)
    assert geometry.dspark == DSpark(
        block_size=5,
        noise_token_id=128799,
        target_layer_ids=(58, 59, 60) if pro else (40, 41, 42),
        markov_rank=512 if pro else 256,
        stages=3,
    )


WRONG_DSPARK = [
    ({"dspark_markov_rank": None}, ["dspark_markov_rank", "missing"]),
    ({"dspark_block_size": 0}, ["dspark_block_size", "0", "integer from 1"]),
    ({"dspark_target_layer_ids": [3, 2]}, ["dspark_target_layer_ids", "[3, 2]", "ascend"]),
    ({"dspark_target_layer_ids": [2, 5]}, ["dspark_target_layer_ids", "[2, 5]", "0 to 4"]),
    ({"dspark_target_layer_ids": []}, ["dspark_target_layer_ids", "[]", "list"]),
    ({"dspark_target_layer_ids": ["2"]}, ["dspark_target_layer_ids", "list of layer numbers"]),
    ({"dspark_noise_token_id": 320}, ["dspark_noise_token_id", "320", "320 tokens"]),
    ({"compress_ratios": [0, 0, 4, 128, 4]}, ["compress_ratios", "5 entries", "stage"]),
    ({"compress_ratios": [0, 0, 4, 128, 4, 0, 4, 0]}, ["blocks that draft", "(0, 4, 0)"]),
    ({"n_mtp_layers": 2}, ["n_mtp_layers", "2", "3"]),
    ({"dspark_n_routed_experts": 128}, ["dspark_n_routed_experts", "128", "4"]),
    ({"dspark_markov_head_type": "rnn"}, ["dspark_markov_head_type", "rnn", "vanilla"]),
    ({"sample_from_anchor": False}, ["sample_from_anchor", "False", "True"]),
]


@pytest.mark.parametrize(
    "change, named", WRONG_DSPARK, ids=lambda value: "-".join(value) if type(value) is dict else ""
)
def test_wrong_dspark_config(dspark_dir, change, named):
    config = json.loads((dspark_dir / "config.json").read_text()) | change
    with pytest.raises(ConfigError) as raised:
        Geometry.from_config(config)
    assert all(word in str(raised.value) for word in named), str(raised.value)


WRONG = [
    (
        {"architectures": ["DeepseekV3ForCausalLM"]},
        ["DeepseekV3ForCausalLM", "DeepseekV4ForCausalLM"],
    ),
    ({"architectures": None}, ["architectures"]),
    ({"engram_layer_ids": [3]}, ["engram_layer_ids", "V4.1"]),
    ({"kv_source_layer_ids": [0, 1]}, ["kv_source_layer_ids", "V4.1"]),
    ({"hidden_size": None}, ["hidden_size", "missing"]),
    ({"head_dim": 256}, ["head_dim", "256", "512"]),
    ({"sliding_window": 64}, ["sliding_window", "64", "128"]),
    ({"scoring_func": "sigmoid"}, ["scoring_func", "sigmoid"]),
    ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
    ({"compress_ratios": [0, 0, 4, 64, 4, 0]}, ["compress_ratios", "64", "128"]),
    ({"compress_ratios": [0, 0, 4, 128, 0]}, ["compress_ratios", "5 entries"]),
    ({"compress_ratios": [0, 0, 4, 128, 4, 4]}, ["blocks that draft", "0"]),
    ({"o_groups": 3}, ["o_groups", "3", "8"]),
    ({"num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "8"]),
    ({"expert_dtype": "int4"}, ["int4", "fp4", "fp8"]),
    ({"rope_scaling": None}, ["rope_scaling", "missing"]),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, ["linear", "yarn"]),
    ({"rope_scaling": "yarn"}, ["rope_scaling", "'yarn'", "object"]),
    ({"rope_scaling": {"type": "yarn"}}, ["factor", "missing"]),
    ({"compress_ratios": 4}, ["compress_ratios", "4", "list"]),
    ({"num_hidden_layers": 5.0}, ["num_hidden_layers", "5.0", "integer"]),
    ({"hidden_size": "128"}, ["hidden_size", "'128'", "integer"]),
    ({"hidden_size": 130}, ["hidden_size", "130", "32"]),
    ({"vocab_size": 0}, ["vocab_size", "0", "integer from 1"]),
    ({"swiglu_limit": -1}, ["swiglu_limit", "-1", "positive"]),
    (
        {"quantization_config": {"weight_block_size": [64, 64]}},
        ["weight_block_size", "[64, 64]", "[128, 128]"],
    ),
]


@pytest.mark.parametrize(
    "change, named", WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_wrong_config(golden_dir, change, named):
    config = copy.deepcopy(json.loads((golden_dir / "config.json").read_text())) | change
    with pytest.raises(ConfigError) as raised:
        Geometry.from_config(config)
    message = str(raised.value)
    assert all(word in message for word in named), message
    assert "\n" not in message


def test_config_that_is_no_object():
    with pytest.raises(ConfigError, match="holds a list, not an object"):
        Geometry.from_config([])


def test_directory_without_config(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json does not exist"):
        Geometry.from_dir(tmp_path)


def test_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Geometry.from_dir(tmp_path)
