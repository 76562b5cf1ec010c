"""Geometry of a DeepSeek-V4 model, read once from its config.json (docs/model.md §1)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

ARCHITECTURE = "DeepseekV4ForCausalLM"
COMPRESS_RATIOS = (0, 4, 128)

# Fields that only the V4.1 family carries; a config that sets one describes another model.
_OTHER_FAMILY = (
    "kv_source_layer_ids",
    "engram_layer_ids",
    "engram_vocab_size",
    "vision_n_layers",
    "hc_pre_from_prev_sublayer",
)

_FIXED = {
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "index_head_dim": 128,
    "sliding_window": 128,
    "hc_mult": 4,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
}


class Precision(str, Enum):
    """What is rounded (docs/precision.md)."""

    EXACT = "exact"
    """Dequantised weights, fp32 caches and arithmetic: for checking."""
    OFFICIAL = "official"
    """EXACT plus the roundings the model was trained with: cached latents to FP8, indexer to
    FP4."""
    SERVING = "serving"
    """bf16 activations and the packed caches that kernels read."""


class ConfigError(ValueError):
    """A config.json that does not describe a DeepSeek-V4 model this package can run."""


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling of the compressed layers' RoPE; cos and sin are not scaled."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class DSpark:
    """A block-parallel draft: its stages predict `block_size` tokens in one pass (docs/model.md
    §3.8)."""

    block_size: int
    """Tokens drafted in a step."""
    noise_token_id: int
    """Token id that stands for each token of the block but the first."""
    target_layer_ids: tuple[int, ...]
    """Backbone layers whose output the draft reads, ascending."""
    markov_rank: int
    stages: int
    """Blocks of the draft, `mtp.0` to `mtp.{stages - 1}`."""


@dataclass(frozen=True)
class Geometry:
    """Sizes and constants of one model. Names are those of config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    compress_ratios: tuple[int, ...]
    """One entry per backbone layer, then one per MTP block or stage of the draft."""
    index_n_heads: int
    index_topk: int
    num_hash_layers: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn
    num_nextn_predict_layers: int = 1
    """MTP blocks; 0 with a DSpark draft, whose releases say 1 and hold none."""
    dspark: DSpark | None = None
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    expert_dtype: str = "fp4"
    bos_token_id: int = 0
    eos_token_id: int = 1
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    index_head_dim: int = 128
    sliding_window: int = 128
    hc_mult: int = 4
    weight_block: tuple[int, int] = (128, 128)

    @property
    def nope_head_dim(self) -> int:
        return self.head_dim - self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def num_layers(self) -> int:
        """Backbone layers and MTP blocks or stages of the draft."""
        return self.num_hidden_layers + self.num_draft_blocks

    @property
    def num_draft_blocks(self) -> int:
        """Blocks named `mtp.*`: of the older draft, or stages of DSpark."""
        return self.dspark.stages if self.dspark else self.num_nextn_predict_layers

    def is_hash_routed(self, layer: int) -> bool:
        return layer < self.num_hash_layers

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> Geometry:
        """Reads `model_dir`/config.json. Raises ConfigError naming the file when it is absent or
        not JSON."""
        path = Path(model_dir) / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist; give the directory of a DeepSeek-V4 checkpoint"
            ) from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Geometry:
        """Geometry of a config.json mapping.

        Raises ConfigError with the field, its value and what is supported, for another
        architecture, a V4.1 field, a missing field, an unknown compress ratio, or sizes that
        contradict one another.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"config.json holds a {type(config).__name__}, not an object")
        _check_family(config)
        for name, supported in _FIXED.items():
            if config.get(name, supported) != supported:
                raise ConfigError(
                    f"config.json: {name} is {config[name]!r}; DeepSeek-V4 has {supported!r}"
                )
        block = (config.get("quantization_config") or {}).get("weight_block_size", [128, 128])
        if list(block) != [128, 128]:
            raise ConfigError(
                f"config.json: weight_block_size is {block}; DeepSeek-V4 has [128, 128]"
            )
        values = {name: _number(config, name, kind) for name, kind in _REQUIRED.items()} | {
            name: _number(config, name, kind)
            for name, kind in _OPTIONAL.items()
            if config.get(name) is not None
        }
        ratios, dspark = _ratios(config), None
        if any(config.get(name) is not None for name in _DSPARK):
            dspark = _dspark(config, len(ratios) - values["num_hidden_layers"])
            values["num_nextn_predict_layers"] = 0
        geometry = cls(compress_ratios=ratios, yarn=_yarn(config), dspark=dspark, **values)
        geometry._check_sizes()
        return geometry

    def _check_sizes(self) -> None:
        ratios = self.compress_ratios
        unknown = sorted({ratio for ratio in ratios if ratio not in COMPRESS_RATIOS})
        if unknown:
            raise ConfigError(
                f"config.json: compress_ratios holds {unknown}; DeepSeek-V4 has {COMPRESS_RATIOS}"
            )
        if self.dspark:
            self._check_dspark(self.dspark)
        if len(ratios) != self.num_layers:
            raise ConfigError(
                f"config.json: compress_ratios has {len(ratios)} entries for"
                f" {self.num_hidden_layers} layers and {self.num_nextn_predict_layers} MTP blocks"
            )
        if any(ratios[self.num_hidden_layers :]):
            raise ConfigError(
                "config.json: the compress_ratios of the blocks that draft are"
                f" {ratios[self.num_hidden_layers :]}, they must be 0"
            )
        if self.num_attention_heads % self.o_groups:
            raise ConfigError(
                f"config.json: o_groups {self.o_groups} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} exceeds "
                f"n_routed_experts {self.n_routed_experts}"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % 32:
                raise ConfigError(
                    f"config.json: {name} is {getattr(self, name)}, not a multiple of the FP4"
                    " block 32"
                )
        if self.expert_dtype not in ("fp4", "fp8"):
            raise ConfigError(
                f"config.json: expert_dtype is {self.expert_dtype!r}; supported are 'fp4' and 'fp8'"
            )

    def _check_dspark(self, dspark: DSpark) -> None:
        if dspark.stages < 1:
            raise ConfigError(
                f"config.json: compress_ratios has {len(self.compress_ratios)} entries for"
                f" {self.num_hidden_layers} layers; a DSpark draft has one more for each stage"
            )
        ids = dspark.target_layer_ids
        if list(ids) != sorted(set(ids)) or not all(0 <= i < self.num_hidden_layers for i in ids):
            raise ConfigError(
                f"config.json: dspark_target_layer_ids is {list(ids)}; they ascend from 0 to"
                f" {self.num_hidden_layers - 1}"
            )
        if dspark.noise_token_id >= self.vocab_size:
            raise ConfigError(
                f"config.json: dspark_noise_token_id is {dspark.noise_token_id}; the vocabulary"
                f" has {self.vocab_size} tokens"
            )


_REQUIRED = (
    dict.fromkeys(
        (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "q_lora_rank",
            "o_groups",
            "o_lora_rank",
            "index_n_heads",
            "index_topk",
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        ),
        int,
    )
    | dict.fromkeys(
        ("routed_scaling_factor", "swiglu_limit", "rope_theta", "compress_rope_theta"), float
    )
    | {"num_hash_layers": "count"}
)
_OPTIONAL = dict.fromkeys(("num_nextn_predict_layers", "bos_token_id", "eos_token_id"), "count") | {
    "hc_sinkhorn_iters": int,
    "hc_eps": float,
    "rms_norm_eps": float,
    "expert_dtype": str,
}
"""Kind of each field: a positive int, a positive float, an int from 0 ("count"), or a str."""


_DSPARK = (
    "dspark_block_size",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
    "dspark_markov_rank",
)
"""Fields of a DSpark draft; one of them asks for all."""

_DSPARK_FIXED = {
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "dspark_markov_head_type": "vanilla",
    "sample_from_anchor": True,
}
"""Fields that no DeepSeek-V4 release sets, with what their absence means."""


def _check_family(config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures") or []
    if ARCHITECTURE not in architectures:
        raise ConfigError(
            f"config.json: architectures is {architectures}; this package serves {ARCHITECTURE}"
        )
    for name in _OTHER_FAMILY:
        if config.get(name):
            raise ConfigError(
                f"config.json: {name} is set; that is a DeepSeek-V4.1 field, and V4.1 is not"
                " supported"
            )


def _require(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise ConfigError(f"config.json: {name} is missing")
    return config[name]


def _number(config: Mapping[str, Any], name: str, kind: type | str, where: str = "") -> Any:
    value = _require(config, name)
    if kind is str:
        fits, wanted = isinstance(value, str), "a string"
    elif kind is float:
        fits, wanted = isinstance(value, (int, float)) and value > 0, "a positive number"
    else:
        least = 0 if kind == "count" else 1
        fits, wanted = isinstance(value, int) and value >= least, f"an integer from {least}"
    if not fits or isinstance(value, bool):
        raise ConfigError(f"config.json: {where}{name} is {value!r}, not {wanted}")
    return value


def _ratios(config: Mapping[str, Any]) -> tuple[int, ...]:
    ratios = _require(config, "compress_ratios")
    if not isinstance(ratios, Sequence) or isinstance(ratios, str):
        raise ConfigError(f"config.json: compress_ratios is {ratios!r}, not a list")
    return tuple(ratios)


def _yarn(config: Mapping[str, Any]) -> Yarn:
    scaling = _require(config, "rope_scaling")
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_scaling is {scaling!r}, not an object")
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_scaling type is {kind!r}; DeepSeek-V4 uses 'yarn'")
    return Yarn(
        *(
            _number(
                scaling,
                each.name,
                int if each.name.startswith("original") else float,
                "rope_scaling.",
            )
            for each in fields(Yarn)
        )
    )


def _dspark(config: Mapping[str, Any], stages: int) -> DSpark:
    """The draft that the dspark_* fields describe; `stages` is what compress_ratios leaves for
    it."""
    ids = _require(config, "dspark_target_layer_ids")
    if not isinstance(ids, Sequence) or not ids or not all(type(i) is int for i in ids):
        raise ConfigError(
            f"config.json: dspark_target_layer_ids is {ids!r}, not a list of layer numbers"
        )
    supported = _DSPARK_FIXED | {
        "n_mtp_layers": stages,
        "dspark_n_routed_experts": config.get("n_routed_experts"),
        "dspark_num_experts_per_tok": config.get("num_experts_per_tok"),
    }
    for name, value in supported.items():
        if config.get(name) is not None and config[name] != value:
            raise ConfigError(
                f"config.json: {name} is {config[name]!r}; the draft of this model has {value!r}"
            )
    return DSpark(
        block_size=_number(config, "dspark_block_size", int),
        noise_token_id=_number(config, "dspark_noise_token_id", "count"),
        target_layer_ids=tuple(ids),
        markov_rank=_number(config, "dspark_markov_rank", int),
        stages=stages,
    )
