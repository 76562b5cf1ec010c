"""Small checkpoints in the released format, real head geometry, few layers, narrow; random weights
for them (docs/model.md §1, §2)."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import ARCHITECTURE, ConfigError, Geometry
from ..formats import quantize_weight_fp4, quantize_weight_fp8, ue8m0_to_float
from .files import INDEX, SINGLE
from .schema import TensorSpec, expected_tensors
from .tiny_tokenizer import VOCAB_SIZE, byte_id, write_tokenizer

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    INDEX,
    "model*.safetensors",
)
"""Patterns of everything that `write_tiny` writes."""


def tiny_config(
    layers: int = 6,
    hidden: int = 256,
    experts: int = 8,
    experts_per_token: int = 3,
    heads: int = 8,
    o_groups: int = 4,
    intermediate: int = 256,
    index_topk: int = 64,
    expert_dtype: str = "fp4",
    compress_ratios: Sequence[int] | None = None,
    mtp_blocks: int = 1,
    dspark_stages: int = 0,
    dspark_block: int = 5,
    dspark_rank: int = 16,
    dspark_taps: Sequence[int] | None = None,
    max_length: int = 65536,
) -> dict[str, Any]:
    """config.json of a small model in the released fields.

    Without `compress_ratios` (one per backbone layer) the layers follow Flash: 0, 0, then 4 and 128
    in turn. With `dspark_stages` the draft is a DSpark one, which reads the layers `dspark_taps`
    (the last three by default), in the place of MTP blocks. Raises ConfigError naming the option
    and its value for sizes that the formats or the geometry do not allow.
    """
    for name, value, unit in (
        ("layers", layers, 1),
        ("hidden", hidden, 128),
        ("experts", experts, 1),
        ("experts_per_token", experts_per_token, 1),
        ("heads", heads, 1),
        ("o_groups", o_groups, 1),
        ("intermediate", intermediate, 128),
        ("index_topk", index_topk, 1),
    ):
        if value < 1 or value % unit:
            raise ConfigError(
                f"{name} is {value}; it must be a positive"
                f" {'integer' if unit == 1 else f'multiple of {unit}'}"
            )
    if compress_ratios is None:
        compress_ratios = [
            0 if layer < 2 else 4 if layer % 2 == 0 else 128 for layer in range(layers)
        ]
    if len(compress_ratios) != layers:
        raise ConfigError(
            f"{len(compress_ratios)} compress ratios for {layers} layers; give one for each layer"
        )
    drafting = dspark_stages or mtp_blocks
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": layers,
        # 1 in every release, also in those whose draft is another one.
        "num_nextn_predict_layers": 1 if dspark_stages else mtp_blocks,
        "compress_ratios": [*compress_ratios, *[0] * drafting],
        "hidden_size": hidden,
        "vocab_size": VOCAB_SIZE,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 128,
        "o_groups": o_groups,
        "o_lora_rank": 128,
        "sliding_window": 128,
        # With few index heads whole rows of scores are zero after the ReLU, and their top-k is a
        # tie.
        "index_n_heads": 16,
        "index_head_dim": 128,
        "index_topk": index_topk,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": experts_per_token,
        "moe_intermediate_size": intermediate,
        "num_hash_layers": min(3, layers),
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "max_position_embeddings": max_length,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
        | ({"scale_fmt": "ue8m0"} if expert_dtype == "fp4" else {}),
        "expert_dtype": expert_dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "initializer_range": 0.02,
    }
    if dspark_stages:
        config |= {
            "dspark_block_size": dspark_block,
            "dspark_noise_token_id": VOCAB_SIZE - 1,
            "dspark_target_layer_ids": list(
                range(max(0, layers - 3), layers) if dspark_taps is None else dspark_taps
            ),
            "dspark_markov_rank": dspark_rank,
        }
    Geometry.from_config(config)
    return config


# (mean, standard deviation) of vectors and small matrices, by the end of their name. Norms of what
# is cached are above 1 and sinks near the logarithm of a window's softmax sum, so that attention is
# neither flat nor all sink.
_PLAIN = (
    (r"(kv_norm|compressor\.norm)\.weight", (1.5, 0.15)),
    (r"norm\.weight", (1.0, 0.1)),
    (r"attn_sink", (4.0, 1.0)),
    (r"ape", (0.0, 1.0)),
    (r"hc_\w+_scale", (1.0, 0.3)),
    (r"hc_\w+_base", (0.0, 0.4)),
    (r"gate\.bias", (0.0, 0.3)),
    (r"embed\.weight|markov_w1\.weight", (0.0, 1.0)),
)
# Standard deviation times sqrt(inputs) of matrices. w1 and w3 reach swiglu_limit for some percent
# of their outputs, as trained ones do; w2 brings that back to the size of the residual.
_GAIN = (
    (r"\.w[13]\.weight", 4.5),
    (r"\.w2\.weight", 0.075),
    (r"wo_b\.weight", 2.0),
    (r"ffn\.gate\.weight", 1.5),
    (r"head\.weight", 2.0),
    (r"(\.weight|_fn)", 1.0),
)


def _rule(table: tuple, name: str) -> Any:
    return next((value for pattern, value in table if re.search(pattern + "$", name)), None)


def random_tensors(geometry: Geometry, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every released tensor of `geometry`, random, with its released dtype; logits have a standard
    deviation near 2."""
    expected = expected_tensors(geometry)
    generator = torch.Generator().manual_seed(seed)
    for name, spec in expected.items():
        if spec.scale is not None:
            yield from _pair(spec, expected[spec.scale], generator)
        elif spec.weight is None:
            yield name, _single(spec, geometry, generator)


def _pair(
    spec: TensorSpec, scale_spec: TensorSpec, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    rows, columns = spec.shape[0], spec.shape[1] * (2 if spec.dtype == "I8" else 1)
    dense = (
        torch.randn(rows, columns, generator=generator) * _rule(_GAIN, spec.name) * columns**-0.5
    )
    weight, scale = quantize_weight_fp4(dense) if spec.dtype == "I8" else quantize_weight_fp8(dense)
    if scale_spec.dtype == "F32":
        # Scales of Base releases are not powers of two.
        scale = ue8m0_to_float(scale) * (0.75 + 0.5 * torch.rand(scale.shape, generator=generator))
    yield spec.name, weight
    yield scale_spec.name, scale


def _single(spec: TensorSpec, geometry: Geometry, generator: torch.Generator) -> Tensor:
    if spec.dtype == "I64":
        scores = torch.rand(spec.shape[0], geometry.n_routed_experts, generator=generator)
        return scores.argsort(-1)[:, : spec.shape[1]].contiguous()
    noise = torch.randn(spec.shape, generator=generator)
    plain = _rule(_PLAIN, spec.name)
    mean, deviation = plain if plain else (0.0, _rule(_GAIN, spec.name) * spec.shape[-1] ** -0.5)
    values = mean + deviation * noise
    if spec.name == "head.weight":
        # Printable ASCII stands out, so that answers are readable text and seldom end by chance.
        readable = torch.zeros(spec.shape[0], dtype=torch.bool)
        readable[byte_id(0x20) : byte_id(0x7F)] = True
        values[~readable] *= 0.25
    return values.to(torch.bfloat16 if spec.dtype == "BF16" else torch.float32)


def write_tiny(
    directory: str | Path,
    config: dict[str, Any],
    seed: int = 0,
    shard_bytes: int | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """`write_checkpoint` of `config` (`tiny_config`) with random weights of `seed` and a tokenizer
    of bytes."""
    tensors = random_tensors(Geometry.from_config(config), seed)
    write_checkpoint(
        directory,
        config,
        tensors,
        lambda fresh: write_tokenizer(fresh, config["max_position_embeddings"]),
        shard_bytes,
        force,
        progress,
    )


def write_checkpoint(
    directory: str | Path,
    config: dict[str, Any],
    tensors: Iterator[tuple[str, Tensor]],
    tokenizer: Callable[[Path], None],
    shard_bytes: int | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes config.json, weights and tokenizer of a released-format checkpoint into `directory`.

    `tensors` yields every tensor of `expected_tensors` in its order and dtype; `tokenizer` writes
    its files into the directory it is called with. With `shard_bytes` the weights go into files of
    at most that many bytes of data (one tensor at least) and an index. The directory appears
    complete or not at all. Raises ConfigError, ValueError for a tensor that does not belong, and
    FileExistsError for a directory that is not empty, unless `force` is given and it holds nothing
    but a checkpoint.
    """
    directory = Path(directory).resolve()
    geometry = Geometry.from_config(config)
    _check_target(directory, force)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write_json(fresh / "config.json", config)
        _write_json(
            fresh / "generation_config.json",
            {
                "bos_token_id": 0,
                "eos_token_id": 1,
                "do_sample": True,
                "temperature": 1.0,
                "top_p": 1.0,
            },
        )
        tokenizer(fresh)
        _write_weights(fresh, geometry, tensors, shard_bytes, progress)
        _open_to_readers(fresh)
        _replace(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_target(directory: Path, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(
            f"{directory} is a file; name a directory that does not exist or is empty"
        )
    held = sorted(directory.iterdir()) if directory.exists() else []
    foreign = [path.name for path in held if not any(path.match(pattern) for pattern in FILES)]
    if held and not force:
        raise FileExistsError(
            f"{directory} is not empty; name another directory, or give --force to replace the"
            " checkpoint in it"
        )
    if foreign:
        raise FileExistsError(
            f"{directory} holds {foreign[0]}, which is no part of a checkpoint; "
            "--force replaces only checkpoints, remove it first"
        )


def _open_to_readers(directory: Path) -> None:
    """Ordinary permissions: temporary directories and safetensors files are made for their owner
    alone."""
    directory.chmod(0o755)
    for path in directory.iterdir():
        path.chmod(0o644)


def _replace(fresh: Path, directory: Path) -> None:
    """Renames `fresh` to `directory`; what was there goes only once it is out of the way."""
    old = fresh.with_name(fresh.name + ".replaced")
    if directory.exists():
        os.rename(directory, old)
    os.rename(fresh, directory)
    shutil.rmtree(old, ignore_errors=True)


def _write_weights(
    directory: Path,
    geometry: Geometry,
    tensors: Iterator[tuple[str, Tensor]],
    shard_bytes: int | None,
    progress: Callable[[str], None],
) -> None:
    expected = expected_tensors(geometry)
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in expected.items():
        if shard_bytes is not None and shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    names = (
        [SINGLE]
        if shard_bytes is None
        else [
            f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            for index in range(1, len(shards) + 1)
        ]
    )
    for file, members in zip(names, shards):
        held = dict(next(tensors) for _ in members)
        if list(held) != members:
            raise ValueError(
                f"tensors {sorted({*held} ^ {*members})[:3]} do not belong in {file}, or are"
                " missing there"
            )
        save_file(held, directory / file, metadata={"format": "pt"})
        progress(f"{file}: {len(members)} tensors")
    if shard_bytes is not None:
        _write_json(
            directory / INDEX,
            {
                "metadata": {"total_size": sum(spec.nbytes for spec in expected.values())},
                "weight_map": {
                    name: file for file, members in zip(names, shards) for name in members
                },
            },
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
