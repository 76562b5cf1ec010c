"""Which of the host's options are refused with this model, and why: one table.

`dsv4 serve` reads it on the command line, before SGLang is imported; however the server is started,
it is read again on the arguments that the host resolved. docs/host.md shows it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """An option of SGLang and the values of it that can be served."""

    names: tuple[str, ...]
    """Its spellings, the one to show first."""
    field: str
    """Of the host's resolved arguments."""
    kind: type
    """bool for an option without a value."""
    serves: Callable[[Any], bool]
    why: str
    is_range: bool = False
    """Whether `why` says which values are served, and not that the option is not."""

    @property
    def name(self) -> str:
        return self.names[0]

    def refusal(self, value: Any) -> str | None:
        """A sentence when `value` is refused. A value that is not given is None or False."""
        if value is None or value is False or self.serves(value):
            return None
        given = self.name if value is True else f"{self.name} {value}"
        if self.is_range:
            return f"{given} cannot be served: {self.why}"
        return (
            f"{given} asks for what dsv4_plugin does not do: {self.why}. Leave it out, or set"
            " DSV4_PLUGIN=0 to serve with SGLang's own DeepSeek-V4"
        )


def _feature(name: str, why: str, *spellings: str, field: str = "") -> Option:
    """An option without a value that is refused."""
    return Option((name, *spellings), field or _field(name), bool, lambda value: False, why)


def _values(name: str, served: Sequence[str], why: str, *spellings: str) -> Option:
    """An option with a text of which these are served."""
    return Option((name, *spellings), _field(name), str, lambda value: value in served, why)


def _one(name: str, why: str, *spellings: str) -> Option:
    """A number of processes that must be 1."""
    return Option((name, *spellings), _field(name), int, lambda value: value <= 1, why)


def _least(name: str, least: int, *spellings: str, field: str = "", kind: type = int) -> Option:
    """A number that must be large enough for a server that answers."""
    return Option(
        (name, *spellings),
        field or _field(name),
        kind,
        lambda value: value >= least,
        f"it must be at least {least}",
        is_range=True,
    )


def _field(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


_LOADER = "weights come from the checkpoint's safetensors files"
_HOST_LAYERS = "it is for layers of SGLang, and the model is ours"
_GENERATES = "the model generates text"

OPTIONS: tuple[Option, ...] = (
    _one("--pp-size", "there is no pipeline parallelism", "--pipeline-parallel-size"),
    _one("--attn-dp-size", "there is no data-parallel attention", "--attention-data-parallel-size"),
    _feature("--enable-dp-attention", "there is no data-parallel attention"),
    _one("--dp-size", "replicas are servers of their own; start one each", "--data-parallel-size"),
    _one("--attn-cp-size", "there is no context parallelism", "--attention-context-parallel-size"),
    _feature("--enable-prefill-cp", "there is no context parallelism"),
    _one("--dcp-size", "there is no context parallelism", "--decode-context-parallel-size"),
    _one(
        "--moe-dp-size", "experts are split by --ep-size and --tp-size", "--moe-data-parallel-size"
    ),
    _values("--moe-a2a-backend", ("none",), "experts are summed with all-reduce"),
    _feature("--enable-eplb", "experts stay where they are loaded"),
    _feature("--enable-two-batch-overlap", _HOST_LAYERS),
    _feature("--enable-single-batch-overlap", _HOST_LAYERS),
    _feature("--enable-lora", "there are no LoRA adapters"),
    _feature("--enable-hisparse", "there is no hierarchical cache"),
    _feature("--enable-hierarchical-cache", "there is no hierarchical cache"),
    _feature("--enable-lmcache", "its cache does not know this model's pages"),
    _feature("--enable-flexkv", "its cache does not know this model's pages"),
    _values("--disaggregation-mode", ("null",), "prefill and decode are served together"),
    Option(
        ("--speculative-algorithm",),
        "speculative_algorithm",
        str,
        lambda value: False,
        "there is no speculative decoding in the server",
    ),
    _values("--dtype", ("auto", "bfloat16"), "DSV4_PRECISION chooses the precision"),
    _values("--quantization", ("fp8",), "the checkpoint says how its weights are stored"),
    _values("--kv-cache-dtype", ("auto", "fp8_e4m3"), "DSV4_PRECISION chooses the precision"),
    _values("--json-model-override-args", ("", "{}"), "the model is that of its config.json"),
    Option(
        ("--quantization-param-path",),
        "quantization_param_path",
        str,
        lambda value: False,
        "the caches carry their own scales",
    ),
    _values("--load-format", ("auto", "safetensors", "dummy"), _LOADER),
    _values("--model-impl", ("auto", "sglang"), "the model is ours"),
    _feature("--is-embedding", _GENERATES),
    _feature("--enable-multimodal", "the model reads text"),
    _feature("--encoder-only", _GENERATES),
    _feature("--language-only", "there is no encoder beside the model"),
    _feature("--disable-hybrid-swa-memory", "the sliding windows have a pool of their own"),
    _feature("--enable-unified-memory", "the sliding windows have a pool of their own"),
    _feature("--enable-page-major-kv-layout", "the pages are those of docs/host.md"),
    _feature("--smg-grpc-mode", "requests are checked in the HTTP server only"),
    _feature("--grpc-mode", "requests are checked in the HTTP server only"),
    Option(
        ("--grpc-port",),
        "grpc_port",
        int,
        lambda value: False,
        "requests are checked in the HTTP server only",
    ),
    _feature("--use-ray", "workers are started by SGLang itself"),
    _feature("--enable-return-routed-experts", "the experts of a token are not recorded"),
    _feature("--enable-return-indexer-topk", "the indexer's choices are not recorded"),
    _feature("--enable-memory-saver", "the memory of weights and caches is not given back"),
    _feature("--enable-mis", "the attention has no mask for several items"),
    _feature("--enable-deepseek-v4-fp4-indexer", "index keys are cached in FP8"),
    _feature("--enable-amd-monokernel", "it replaces layers of SGLang's own model"),
    _feature("--enable-nvidia-megakernel", "it replaces layers of SGLang's own model"),
    _least("--context-length", 16),
    _least("--max-prefill-tokens", 1),
    _least("--prefill-max-requests", 1),
    _least("--max-queued-requests", 1),
    _least("--max-running-requests", 1),
    _least("--max-total-tokens", 512),
    _least("--dist-timeout", 1),
    _least("--nccl-port", 1),
    _least("--gated-launch-port", 1),
    _least("--node-rank", 0),
    _least("--nnodes", 1),
    Option(
        ("--page-size",),
        "page_size",
        int,
        lambda value: value == 256,
        "a page of the caches holds 256 tokens",
        is_range=True,
    ),
    Option(
        ("--chunked-prefill-size",),
        "chunked_prefill_size",
        int,
        lambda value: value > 0 and value % 256 == 0,
        "a chunk must be a multiple of the page of 256 tokens",
        is_range=True,
    ),
    Option(
        ("--mem-fraction-static",),
        "mem_fraction_static",
        float,
        lambda value: 0 < value < 1,
        "it must be a share between 0 and 1",
        is_range=True,
    ),
)


def refusals(arguments: Any) -> Iterator[str]:
    """Sentences about the host's resolved `arguments` that cannot be served."""
    for option in OPTIONS:
        sentence = option.refusal(getattr(arguments, option.field))
        if sentence:
            yield sentence


def given(words: Sequence[str]) -> argparse.Namespace:
    """What the words of a command line say of the options of the table, as the host would resolve
    it; None or False where they say nothing.

    Words that are no option of the table, or no value of one, are left to the host.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in OPTIONS:
        value = {"action": "store_true"} if option.kind is bool else {"type": str}
        parser.add_argument(*option.names, dest=option.field, **value)
    try:
        found, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        found = parser.parse_args([])
    for option in OPTIONS:
        value = getattr(found, option.field)
        if isinstance(value, str):
            try:
                value = option.kind(value)
            except ValueError:  # SGLang also reads "16k"
                value = None
        setattr(found, option.field, value)
    return found


def markdown() -> str:
    """The table, as docs/host.md shows it."""
    rows = [f"| `{option.name}` | {option.why} |" for option in OPTIONS]
    return "\n".join(["| option | why it, or a value of it, is refused |", "|---|---|", *rows])
