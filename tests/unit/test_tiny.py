"""Tiny checkpoints: in the released format, the same for the same seed, all or nothing, with a
tokenizer that chats."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dsv4_plugin.checkpoint import tiny
from dsv4_plugin.checkpoint.files import INDEX, CheckpointFiles
from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny
from dsv4_plugin.checkpoint.tiny_tokenizer import special_tokens
from dsv4_plugin.config import ConfigError, Geometry

SMALL = {"layers": 1, "hidden": 128, "intermediate": 128, "experts": 4}


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": 5, "hidden": 384, "experts": 12, "experts_per_token": 6},
        {"expert_dtype": "fp8"},
        {"mtp_blocks": 0},
        {"dspark_stages": 3},
        {"dspark_stages": 1, "dspark_block": 2, "dspark_rank": 8, "dspark_taps": (0,)},
        {"compress_ratios": [128, 4, 0], "layers": 3},
    ],
    ids=str,
)
def test_files_are_in_the_released_format(tmp_path, options):
    write_tiny(tmp_path / "model", tiny_config(**SMALL | options))
    geometry = Geometry.from_dir(tmp_path / "model")
    CheckpointFiles(tmp_path / "model").check(geometry)
    assert (geometry.head_dim, geometry.qk_rope_head_dim, geometry.index_head_dim) == (512, 64, 128)


def test_default_has_every_kind_of_layer():
    geometry = Geometry.from_config(tiny_config())
    assert set(geometry.compress_ratios) == {0, 4, 128}
    assert {geometry.is_hash_routed(layer) for layer in range(geometry.num_hidden_layers)} == {
        True,
        False,
    }


def test_the_seed_decides_the_bytes(tmp_path):
    config = tiny_config(**SMALL)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_tiny(tmp_path / name, config, seed)
    first, same, other = (contents(tmp_path / name) for name in "abc")
    assert first == same
    assert [name for name in first if first[name] != other[name]] == ["model.safetensors"]


def test_shards_hold_the_same_tensors(tmp_path):
    config = tiny_config(**SMALL)
    write_tiny(tmp_path / "one", config)
    write_tiny(tmp_path / "many", config, shard_bytes=400_000)
    one = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["weight_map"].keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / "many" / file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 400_000
        assert all(
            torch.equal(tensor.view(torch.uint8), one[name].view(torch.uint8))
            for name, tensor in held.items()
        )


@pytest.fixture(scope="module")
def tensors():
    config = tiny_config(layers=4, hidden=128, dspark_stages=2)
    return dict(tiny.random_tensors(Geometry.from_config(config), seed=0))


def test_nothing_is_left_at_zero(tensors):
    for name, tensor in tensors.items():
        values = (
            tensor.view(torch.uint8).float()
            if tensor.dtype == torch.float8_e8m0fnu
            else tensor.float()
        )
        assert bool(values.isfinite().all()), name
        # Scales of one or two blocks may be equal; everything else varies.
        assert values.count_nonzero() > 0.5 * values.numel(), name
        assert name.endswith(".scale") or values.numel() < 4 or values.std() > 0, name


def test_hash_tables_name_distinct_experts(tensors):
    table = tensors["layers.1.ffn.gate.tid2eid"]
    assert int(table.min()) >= 0 and int(table.max()) < 8
    assert all(len(set(row)) == 3 for row in table.tolist())


@pytest.mark.parametrize(
    "options, named",
    [
        ({"hidden": 100}, ["hidden", "100", "128"]),
        ({"layers": 0}, ["layers", "0"]),
        ({"experts": 2}, ["3", "2"]),
        ({"o_groups": 3}, ["o_groups", "3", "8"]),
        ({"compress_ratios": [0]}, ["1 compress ratios", "6 layers"]),
        ({"layers": 2, "compress_ratios": [0, 7]}, ["7", "128"]),
        ({"intermediate": -128}, ["intermediate", "-128"]),
        ({"dspark_stages": 2, "dspark_taps": (6,)}, ["dspark_target_layer_ids", "6", "0 to 5"]),
    ],
)
def test_sizes_that_do_not_fit(options, named):
    with pytest.raises(ConfigError) as raised:
        tiny_config(**options)
    assert all(word in str(raised.value) for word in named), raised.value


def test_directory_in_use_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_tiny(tmp_path, tiny_config(**SMALL))
    with pytest.raises(FileExistsError, match="notes.txt, which is no part of a checkpoint"):
        write_tiny(tmp_path, tiny_config(**SMALL), force=True)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_file_in_the_way(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        write_tiny(tmp_path / "model", tiny_config(**SMALL), force=True)


def test_force_replaces_a_checkpoint(tmp_path):
    write_tiny(tmp_path / "model", tiny_config(**SMALL), shard_bytes=400_000)
    write_tiny(tmp_path / "model", tiny_config(**SMALL | {"experts": 8}), force=True)
    assert not (tmp_path / "model" / INDEX).exists()
    CheckpointFiles(tmp_path / "model").check(Geometry.from_dir(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_half_written(tmp_path, monkeypatch):
    write_tiny(tmp_path / "model", tiny_config(**SMALL))
    before = contents(tmp_path / "model")

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        write_tiny(tmp_path / "model", tiny_config(**SMALL), seed=9, force=True)
    with pytest.raises(OSError, match="No space"):
        write_tiny(tmp_path / "other", tiny_config(**SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert contents(tmp_path / "model") == before


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    """The tokenizer as the host loads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny_dir)


@pytest.mark.parametrize(
    "text", ["Hello", "  two  spaces\n\ttab", "größer, 你好, 🎉", "<b>&amp;</b> |User|", ""]
)
def test_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_have_the_released_ids(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<｜begin▁of▁sentence｜>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<｜end▁of▁sentence｜>", 1)
    for token, index in special_tokens().items():
        assert tokenizer.encode(token) == [index]


def test_every_id_of_the_model_is_a_token(tokenizer, tiny_dir):
    size = Geometry.from_dir(tiny_dir).vocab_size
    assert len(tokenizer) == size
    assert None not in tokenizer.convert_ids_to_tokens(list(range(size)))


def test_reasoning_marks_are_seen_by_parsers(tokenizer):
    ids = tokenizer.encode("<｜User｜>a<think>b</think>c<｜end▁of▁sentence｜>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b</think>c"


def test_chat_renders_with_the_hosts_encoder(tokenizer):
    """The package that the host renders DeepSeek-V4 chats with, given this tokenizer."""
    recipe = pytest.importorskip("deepseek_recipe")
    encoding = recipe.DeepseekV4Encoding().with_tokenizer(
        recipe.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    )
    for thinking, opener in (("enabled", "<think>"), ("disabled", "</think>")):
        request = recipe.ChatCompletionRequest(
            {
                "model": "DeepSeek-V4-Pro",
                "thinking": {"type": thinking},
                "reasoning_effort": "high",
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Say <｜User｜>!"},
                ],
            }
        )
        ids = encoding.encode(request.convert(recipe.ConversionOptions()).conversation)
        assert ids[0] == tokenizer.bos_token_id
        # The marker that the user typed is plain text, not a token.
        assert ids.count(special_tokens()["<｜User｜>"]) == 1
        assert tokenizer.decode(ids).endswith(
            f"Be brief.<｜User｜>Say <｜User｜>!<｜Assistant｜>{opener}"
        )
