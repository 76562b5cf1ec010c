"""Every wrong checkpoint gets one CheckpointError, from headers alone."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_plugin.checkpoint.files import INDEX, CheckpointError, CheckpointFiles
from dsv4_plugin.config import Geometry


@pytest.fixture
def copy(tiny_dir, tmp_path):
    """A checkpoint in shards that the test may spoil."""
    return shutil.copytree(tiny_dir, tmp_path / "model")


def refusal(directory) -> str:
    """The message of the one error that opening and checking a checkpoint raises."""
    with pytest.raises(CheckpointError) as raised:
        CheckpointFiles(directory).check(Geometry.from_dir(directory))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit(directory, name: str, change) -> None:
    """Rewrites the shard that holds `name` after `change(tensors)`, and the index to match."""
    index = json.loads((directory / INDEX).read_text())
    file = index["weight_map"][name]
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)
    index["weight_map"] = {
        key: value for key, value in index["weight_map"].items() if value != file
    } | dict.fromkeys(tensors, file)
    (directory / INDEX).write_text(json.dumps(index))


def test_whole_checkpoints_pass(tiny_dir, golden_dir, golden_geometry):
    files = CheckpointFiles(tiny_dir)
    assert len(files.files) > 1
    files.check(Geometry.from_dir(tiny_dir))
    CheckpointFiles(golden_dir).check(golden_geometry)


def test_tensors_are_those_of_the_files(golden_dir):
    expected = load_file(golden_dir / "model.safetensors")
    read = dict(CheckpointFiles(golden_dir).tensors())
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(
            tensor.flatten().view(torch.uint8), expected[name].flatten().view(torch.uint8)
        )


def test_tensors_of_all_shards_come_once(tiny_dir):
    names = [name for name, _ in CheckpointFiles(tiny_dir).tensors()]
    assert sorted(names) == sorted(json.loads((tiny_dir / INDEX).read_text())["weight_map"])


def test_missing_tensor(copy):
    edit(
        copy, "layers.3.attn.wq_a.weight", lambda tensors: tensors.pop("layers.3.attn.wq_a.weight")
    )
    assert "1 missing: layers.3.attn.wq_a.weight;" in refusal(copy)


def test_many_offenders_are_counted(copy):
    def spoil(tensors):
        for name in [name for name in tensors if ".experts." in name][:9]:
            del tensors[name]
        tensors["layers.0.attn.surprise"] = torch.zeros(3)

    edit(copy, "layers.3.attn.wq_a.weight", spoil)
    message = refusal(copy)
    assert "9 missing: " in message and " and 6 more" in message
    assert "1 unexpected: layers.0.attn.surprise" in message


@pytest.mark.parametrize(
    "replacement, told",
    [
        (
            torch.zeros(512, 64, dtype=torch.float8_e4m3fn),
            "is F8_E4M3 [512, 64], not F8_E4M3 [512, 128]",
        ),
        (torch.zeros(512, 128, dtype=torch.bfloat16), "is BF16 [512, 128], not F8_E4M3 [512, 128]"),
    ],
)
def test_wrong_shape_or_dtype(copy, replacement, told):
    edit(
        copy,
        "layers.1.attn.wkv.weight",
        lambda tensors: tensors.update({"layers.1.attn.wkv.weight": replacement}),
    )
    assert f"1 wrong: layers.1.attn.wkv.weight {told};" in refusal(copy)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_shard(copy, size):
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    os.truncate(shard, size if size >= 0 else shard.stat().st_size + size)
    message = refusal(copy)
    assert shard.name in message and "truncated" in message


def test_shard_that_is_something_else(copy):
    shard = sorted(copy.glob("model-*.safetensors"))[0]
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 40)
    assert shard.name in refusal(copy)


@pytest.mark.parametrize(
    "name",
    [
        "mtp.0.main_proj.scale",
        "mtp.1.ffn.shared_experts.w2.weight",
        "mtp.2.markov_head.markov_w1.weight",
        "mtp.2.confidence_head.proj.weight",
    ],
)
def test_missing_tensor_of_a_dspark_draft(dspark_dir, tmp_path, name):
    shutil.copytree(dspark_dir, tmp_path / "model")
    tensors = load_file(dspark_dir / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert f"1 missing: {name};" in refusal(tmp_path / "model")


def test_a_draft_of_the_older_kind_under_a_dspark_config(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "compress_ratios": [*config["compress_ratios"], 0, 0],
        "dspark_block_size": 5,
        "dspark_noise_token_id": 7,
        "dspark_target_layer_ids": [3, 4, 5],
        "dspark_markov_rank": 16,
    }
    (copy / "config.json").write_text(json.dumps(config))
    message = refusal(copy)
    assert "missing: mtp.0.main_proj.weight" in message
    # Two projections with their scales, three norms, and the three of the head's collapse.
    assert "10 unexpected" in message and "mtp.0.e_proj.weight" in message


def test_index_names_an_absent_file(copy):
    shard = sorted(copy.glob("model-*.safetensors"))[-1]
    shard.unlink()
    message = refusal(copy)
    assert shard.name in message and "incomplete" in message


def test_index_names_an_absent_tensor(copy):
    index = json.loads((copy / INDEX).read_text())
    first = index["weight_map"]["norm.weight"]
    index["weight_map"]["layers.77.ghost"] = first
    (copy / INDEX).write_text(json.dumps(index))
    assert f"1 not where it says: layers.77.ghost in {first}" in refusal(copy)


def test_file_holds_what_the_index_does_not_name(copy):
    index = json.loads((copy / INDEX).read_text())
    del index["weight_map"]["norm.weight"]
    (copy / INDEX).write_text(json.dumps(index))
    assert "1 not in the index: norm.weight" in refusal(copy)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": null}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"norm.weight": 3}}',
    ],
)
def test_index_that_is_none(copy, text):
    (copy / INDEX).write_text(text)
    message = refusal(copy)
    assert INDEX in message and "not an index" in message


def test_tensor_in_two_files(copy):
    index = json.loads((copy / INDEX).read_text())
    other = next(
        file for file in index["weight_map"].values() if file != index["weight_map"]["norm.weight"]
    )
    tensors = load_file(copy / other)
    save_file(tensors | {"norm.weight": torch.zeros(128, dtype=torch.bfloat16)}, copy / other)
    assert "norm.weight is in both" in refusal(copy)


def test_no_weights(tmp_path, golden_dir):
    shutil.copy(golden_dir / "config.json", tmp_path)
    assert "holds neither" in refusal(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        CheckpointFiles(tmp_path / "absent")


def test_config_of_another_size(copy):
    config = json.loads((copy / "config.json").read_text()) | {"n_routed_experts": 16}
    (copy / "config.json").write_text(json.dumps(config))
    message = refusal(copy)
    # 8 more experts of 3 pairs in 7 layers, and the gates' rows and biases of the wrong size.
    assert f"{8 * 3 * 2 * 7} missing" in message and "wrong: " in message


def test_fp8_conversion_with_power_of_two_scales(copy):
    """FP8 experts come with fp32 scales in Base releases and with ue8m0 ones in conversions; both
    are read."""
    from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny

    write_tiny(
        copy,
        tiny_config(layers=1, hidden=128, intermediate=128, expert_dtype="fp8"),
        shard_bytes=10**9,
        force=True,
    )
    files = CheckpointFiles(copy)
    files.check(Geometry.from_dir(copy))

    def convert(tensors):
        for name in [name for name in tensors if name.endswith(".scale")]:
            tensors[name] = tensors[name].to(torch.float8_e8m0fnu)

    edit(copy, "norm.weight", convert)
    CheckpointFiles(copy).check(Geometry.from_dir(copy))
