"""Which of the host's options are refused with this model, and why: one table.

`dsv4 serve` reads it on the command line, before SGLang is imported; however the server is started,
it is read again on the arguments that the host resolved. docs/host.md shows it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import flags
from ..config import Precision


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
    return Option((name, *spellings), _field(name), int, lambda value: value == 1, why)


def _never(name: str, why: str, *spellings: str) -> Option:
    """An option whose every value is refused."""
    return Option((name, *spellings), _field(name), str, lambda value: False, why)


def _checked(
    name: str, kind: type, serves: Callable[[Any], bool], why: str, *spellings: str
) -> Option:
    """An option with values that are served and values that make no sense."""
    return Option((name, *spellings), _field(name), kind, serves, why, is_range=True)


def _json(name: str) -> Option:
    """A text that must be an object of JSON."""
    return _checked(name, str, _is_json_object, "it must be a JSON object")


def _log_level(name: str) -> Option:
    return _checked(
        name,
        str,
        lambda value: value.lower() in LOG_LEVELS,
        f"it must be one of {', '.join(LOG_LEVELS)}",
    )


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _least(name: str, least: int, *spellings: str) -> Option:
    """A number that must be large enough for a server that answers."""
    why = f"it must be at least {least}"
    return _checked(name, int, lambda value: value >= least, why, *spellings)


def _is_port(number: int) -> bool:
    return 1 <= number <= 65535


def _port(name: str) -> Option:
    return _checked(name, int, _is_port, "a port is from 1 to 65535")


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and _is_port(int(port))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def _of_pages(name: str, kind: type, *values: str) -> Option:
    """An option that copies pages of the pool: with any of `values`, or all where there are
    none."""
    return Option(
        (name,),
        _field(name),
        kind,
        lambda value: (
            flags.precision() is Precision.SERVING if not values or value in values else True
        ),
        "it copies pages of the pool, which DSV4_PRECISION=exact and official leave unused: their"
        " caches lie beside it. Unset DSV4_PRECISION",
        is_range=True,
    )


LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def _field(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


_OTLP = "opentelemetry.exporter.otlp.proto.grpc"
_LOADER = "weights come from the checkpoint's safetensors files"
_HOST_LAYERS = "it is for layers of SGLang, and the model is ours"
_GENERATES = "the model generates text"
_NO_DRAFTS = (
    "the drafts that are served are those of the checkpoint: DSPARK, or EAGLE for an MTP block"
)
_NO_ADAPTERS = "there are no LoRA adapters"
_NO_RECORD = "the experts of a token are not recorded"
_OTHER_CACHE = "its cache does not know this model's pages"
_KERNELS = "DSV4_ variables choose the kernels (`dsv4 flags`)"

MTP_TOKENS = 3
"""The longest chain that an MTP block was run with; it was trained to draft one token."""

OPTIONS: tuple[Option, ...] = (
    _one(
        "--dp-size",
        "replicas of the whole model are servers of their own; with --enable-dp-attention it counts"
        " those of the attention",
        "--data-parallel-size",
    ),
    _one("--attn-cp-size", "there is no context parallelism", "--attention-context-parallel-size"),
    _feature("--enable-dynamic-chunking", "a chunk is always as large"),
    _feature("--enable-prefill-cp", "there is no context parallelism"),
    _one("--dcp-size", "there is no context parallelism", "--decode-context-parallel-size"),
    _one(
        "--moe-dp-size", "experts are split by --ep-size and --tp-size", "--moe-data-parallel-size"
    ),
    _values("--moe-a2a-backend", ("none",), "experts are summed with all-reduce"),
    _feature("--enable-eplb", "experts stay where they are loaded"),
    _feature("--enable-two-batch-overlap", _HOST_LAYERS),
    _feature("--enable-single-batch-overlap", _HOST_LAYERS),
    _feature("--enable-waterfill", _HOST_LAYERS),
    _feature("--enable-lora", _NO_ADAPTERS),
    _feature("--enable-lora-overlap-loading", _NO_ADAPTERS),
    _never("--lora-paths", _NO_ADAPTERS),
    _feature("--enable-hisparse", "its cache does not know this model's pages"),
    _of_pages("--enable-hierarchical-cache", bool),
    _never("--hicache-storage-backend", "pages go to the host's memory and no further"),
    _feature("--enable-lmcache", _OTHER_CACHE),
    _feature("--enable-flexkv", _OTHER_CACHE),
    _feature("--enable-unified-cache-external-linker", _OTHER_CACHE),
    _never("--radix-cache-backend", _OTHER_CACHE),
    _values("--kv-canary", ("none",), "its checks do not know this model's pages"),
    _feature("--ple-offload-embedding", "the model has one table of embeddings"),
    _of_pages("--disaggregation-mode", str, "prefill", "decode"),
    _checked(
        "--disaggregation-transfer-backend",
        str,
        lambda value: value != "fake",
        "it moves nothing, so that answers would be made up",
    ),
    _values("--speculative-algorithm", ("DSPARK", "EAGLE", "NEXTN"), _NO_DRAFTS),
    # launch.py compares these with the checkpoint
    _checked(
        "--speculative-draft-model-path",
        str,
        lambda value: True,
        "the draft is that of the model's own checkpoint",
    ),
    _least("--speculative-dspark-block-size", 1),
    _one("--speculative-eagle-topk", "an MTP block drafts a chain, and no tree"),
    Option(
        ("--speculative-num-steps",),
        "speculative_num_steps",
        int,
        lambda value: 1 <= value <= MTP_TOKENS,
        f"an MTP block drafts 1 to {MTP_TOKENS} tokens, one after the other",
        is_range=True,
    ),
    _values(
        "--speculative-draft-kv-cache-dtype",
        ("auto", "fp8_e4m3"),
        "DSV4_PRECISION chooses the precision",
    ),
    Option(
        ("--speculative-moe-runner-backend",),
        "speculative_moe_runner_backend",
        str,
        lambda value: value != "megamoe",
        _NO_DRAFTS,
    ),
    _values("--decoupled-spec-role", ("null",), _NO_DRAFTS),
    _checked(
        "--schedule-policy",
        str,
        lambda value: value != "priority",
        "it is no policy of SGLang's scheduler; --enable-priority-scheduling serves by priority",
    ),
    _values("--dtype", ("auto", "bfloat16"), "DSV4_PRECISION chooses the precision"),
    _values("--quantization", ("fp8",), "the checkpoint says how its weights are stored"),
    _values("--kv-cache-dtype", ("auto", "fp8_e4m3"), "DSV4_PRECISION chooses the precision"),
    _values("--json-model-override-args", ("", "{}"), "the model is that of its config.json"),
    _never("--quantization-param-path", "the caches carry their own scales"),
    _values("--load-format", ("auto", "safetensors", "dummy"), _LOADER),
    _values("--weight-cache-mode", ("off",), _LOADER),
    _values("--startup-weight-load-mode", ("serial",), _LOADER),
    _feature("--weight-loader-disable-mmap", "that reader does not know the type of the scales"),
    _values("--model-impl", ("auto", "sglang"), "the model is ours"),
    _values("--prefill-attention-backend", ("dsv4", "compressed"), _KERNELS),
    _values("--decode-attention-backend", ("dsv4", "compressed"), _KERNELS),
    _values("--bf16-gemm-backend", ("auto", "torch"), _KERNELS),
    _values("--cuda-graph-backend-prefill", ("disabled",), "steps with a prefill are not captured"),
    _feature("--enable-torch-compile", "operators choose their kernels, which it would fix"),
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
    _feature("--enable-return-routed-experts", _NO_RECORD),
    _never("--expert-distribution-recorder-mode", _NO_RECORD),
    _values("--expert-balancedness-report-mode", ("off", "none", ""), _NO_RECORD),
    _values("--init-expert-location", ("trivial",), "experts stay where they are loaded"),
    _never("--elastic-ep-backend", "the number of processes is fixed at the start"),
    _feature("--enable-return-indexer-topk", "the indexer's choices are not recorded"),
    _feature("--enable-memory-saver", "the memory of weights and caches is not given back"),
    _feature("--enable-mis", "the attention has no mask for several items"),
    _feature("--enable-deepseek-v4-fp4-indexer", "index keys are cached in FP8"),
    _feature("--enable-amd-monokernel", "it replaces layers of SGLang's own model"),
    _feature("--enable-nvidia-megakernel", "it replaces layers of SGLang's own model"),
    _json("--model-loader-extra-config"),
    _json("--kv-events-config"),
    _json("--modelexpress-config"),
    _checked(
        "--random-seed",
        int,
        lambda value: 0 <= value < 2**32,
        "it must be from 0 to 4294967295",
    ),
    _checked(
        "--dist-init-addr",
        str,
        _is_address,
        "it must be an address and a port, HOST:PORT",
        "--nccl-init-addr",
    ),
    _checked(
        "--tokenizer-path",
        str,
        lambda value: Path(value).exists() or value.count("/") == 1,
        "there is no such directory, and it is no name on the Hugging Face hub, OWNER/NAME",
    ),
    _checked(
        "--tokenizer-backend",
        str,
        lambda value: value == "huggingface" or _installed(value),
        "its package is not installed",
    ),
    _checked(
        "--tool-server",
        str,
        lambda value: _installed("mcp"),
        "its package, mcp, is not installed",
    ),
    _checked(
        "--enable-trace",
        bool,
        lambda value: _installed("opentelemetry.sdk") and _installed(_OTLP),
        "opentelemetry-sdk and opentelemetry-exporter-otlp are not installed",
    ),
    _log_level("--log-level"),
    _log_level("--log-level-http"),
    _checked(
        "--numa-node",
        str,
        lambda value: "-" not in str(value),
        "a node's number is at least 0",
    ),
    _checked(
        "--model-checksum",
        str,
        lambda value: Path(value).is_file() or value.count("/") == 1,
        "it must be a file of checksums or a name on the Hugging Face hub, OWNER/NAME",
    ),
    _least("--attn-dp-size", 1, "--attention-data-parallel-size"),
    _least("--pp-size", 1, "--pipeline-parallel-size"),
    _least("--decode-log-interval", 1),
    _least("--context-length", 16),
    _least("--max-prefill-tokens", 1),
    _least("--prefill-max-requests", 1),
    _least("--max-queued-requests", 1),
    _least("--max-running-requests", 1),
    _least("--max-total-tokens", 512),
    _least("--dist-timeout", 1),
    _port("--nccl-port"),
    _port("--gated-launch-port"),
    _least("--node-rank", 0),
    _least("--nnodes", 1),
    _checked(
        "--page-size",
        int,
        lambda value: value == 256,
        "a page of the caches holds 256 tokens",
    ),
    _checked(
        "--chunked-prefill-size",
        int,
        lambda value: value > 0 and value % 256 == 0,
        "a chunk must be a multiple of the page of 256 tokens",
    ),
    _checked(
        "--swa-full-tokens-ratio",
        float,
        lambda value: 0 < value <= 1,
        "it must be above 0 and at most 1",
    ),
    _checked(
        "--mem-fraction-static",
        float,
        lambda value: 0 < value < 1,
        "it must be a share between 0 and 1",
    ),
)


@dataclass(frozen=True)
class Size:
    """A number of processes, or of groups of them, that is served."""

    names: tuple[str, ...]
    field: str
    """Of the host's resolved arguments."""
    splits: str
    must: str
    tested: str
    """On CPUs, by tests/host/test_layouts.py; no GPU has run several processes of it."""

    @property
    def name(self) -> str:
        return self.names[0]


SIZES: tuple[Size, ...] = (
    Size(
        ("--tp-size", "--tp", "--tensor-parallel-size"),
        "tp_size",
        "everything: heads, the shared expert, routed experts, the vocabulary",
        "divide all of these, FP8 matrices in blocks of 128",
        "2 and 4",
    ),
    Size(
        ("--ep-size", "--ep", "--expert-parallel-size"),
        "ep_size",
        "routed experts by number in so many groups, within which each is split by width",
        "divide `--tp-size` and the number of experts",
        "2 of 2, 2 of 4, 4 of 4",
    ),
    Size(
        ("--attn-dp-size", "--attention-data-parallel-size", "--dp N --enable-dp-attention"),
        "attn_dp_size",
        "requests: so many replicas of attention, shared expert and vocabulary",
        "divide `--tp-size`; each replica's part of `--chunked-prefill-size` is whole pages of 256",
        "2 of 2, 2 of 4, 4 of 4, with and without `--ep-size`",
    ),
    Size(
        ("--pp-size", "--pipeline-parallel-size"),
        "pp_size",
        "layers, in stages of `--tp-size` processes each",
        "be at most the number of layers",
        "2, and 2 with `--tp-size 2`",
    ),
)
"""What `check_checkpoint` checks and docs/parallelism.md shows."""


def sizes_markdown() -> str:
    """The table of sizes, as docs/parallelism.md shows it."""
    rows = [
        f"| {', '.join(f'`{name}`' for name in size.names)} | {size.splits} | {size.must} |"
        f" {size.tested} |"
        for size in SIZES
    ]
    return "\n".join(["| option | splits | must | tested |", "|---|---|---|---|", *rows])


CPU_OPTIONS: tuple[Option, ...] = (
    _feature("--enable-forward-pass-metrics", "on a CPU there are no events of a GPU to time"),
    _feature("--enable-strict-thinking", "SGLang masks tokens of reasoning on a GPU alone"),
    _feature("--speculative-use-block-verification", "on a CPU drafts are accepted one by one"),
)
"""Refused besides, where the device is a CPU."""

CPU_HOST_MEMORY = {"--hicache-io-backend": "direct", "--hicache-mem-layout": "layer_first"}
"""How `--enable-hierarchical-cache` copies pages on a CPU: the way of the host that needs no
kernel."""


@dataclass(frozen=True)
class Ignored:
    """Options that are taken and change nothing with this model."""

    names: tuple[str, ...]
    why: str


IGNORED: tuple[Ignored, ...] = (
    Ignored(
        (
            "--attention-backend",
            "--enable-lean-attention",
            "--fp8-gemm-backend",
            "--fp4-gemm-backend",
            "--moe-runner-backend",
            "--flashinfer-mxfp4-moe-precision",
            "--enable-w4a4-mxfp4-megamoe",
            "--dsa-prefill-backend",
            "--dsa-decode-backend",
            "--dsa-paged-mqa-logits-backend",
            "--dsa-topk-backend",
            "--dsv4-prefill-backend",
            "--dsv4-attn-backend",
            "--disable-shared-experts-fusion",
            "--enforce-shared-experts-fusion",
            "--enable-tf32-matmul",
            "--enable-fp32-lm-head",
        ),
        _KERNELS,
    ),
    Ignored(
        (
            "--modelopt-quant",
            "--modelopt-export-path",
            "--modelopt-checkpoint-save-path",
            "--modelopt-checkpoint-restore-path",
            "--rl-quant-profile",
            "--cpu-offload-gb",
            "--offload-group-size",
            "--kt-weight-path",
            "--custom-weight-loader",
        ),
        "weights are served as the checkpoint stores them",
    ),
    Ignored(
        (
            "--deepep-mode",
            "--deepep-config",
            "--ep-num-redundant-experts",
            "--ep-dispatch-algorithm",
            "--enable-elastic-expert-backup",
        ),
        "experts stay where they are loaded, and are summed with all-reduce",
    ),
    Ignored(("--moe-dense-tp-size",), "every layer has experts; none is dense"),
    Ignored(("--enable-dp-lm-head",), "each replica of the attention has a head of its own"),
    Ignored(
        ("--mamba-backend", "--linear-attn-backend", "--mamba-ssm-dtype"),
        "the model has no layers of that kind",
    ),
)
"""Of those that `dsv4 serve` names at the start. The rest of what SGLang takes and does not use for
this model belongs to features that are refused by their own option, or to pictures and sound."""


def without_effect(words: Sequence[str]) -> Iterator[str]:
    """A sentence for each kind of option among `words` that changes nothing with this model."""
    given_names = [word.split("=")[0] for word in words]
    for ignored in IGNORED:
        found = [name for name in given_names if name in ignored.names]
        if found:
            yield f"{', '.join(found)} will have no effect: {ignored.why}"


def refusals(arguments: Any, table: Sequence[Option] = OPTIONS) -> Iterator[str]:
    """Sentences about the host's resolved `arguments` that cannot be served."""
    for option in table:
        sentence = option.refusal(getattr(arguments, option.field))
        if sentence:
            yield sentence


def given(words: Sequence[str]) -> argparse.Namespace:
    """What the words of a command line say of the options of the table, as the host would resolve
    it; None or False where they say nothing. `--dp-size` with `--enable-dp-attention` is
    `--attn-dp-size`.

    Words that are no option of the table, or no value of one, are left to the host.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in OPTIONS:
        value = {"action": "store_true"} if option.kind is bool else {"type": str}
        parser.add_argument(*option.names, dest=option.field, **value)
    for name in ("--enable-dp-attention", "--enable-streaming-session"):
        parser.add_argument(name, action="store_true")
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
    if found.enable_dp_attention and found.attn_dp_size in (None, 1):
        found.attn_dp_size, found.dp_size = found.dp_size, None
    return found


def markdown() -> str:
    """The tables, as docs/host.md shows them."""
    rows = [f"| `{option.name}` | {option.why} |" for option in (*OPTIONS, *CPU_OPTIONS)]
    refused = ["| option | why it, or a value of it, is refused |", "|---|---|", *rows]
    rows = [f"| {', '.join(f'`{name}`' for name in each.names)} | {each.why} |" for each in IGNORED]
    return "\n".join([*refused, "", "| option without effect | because |", "|---|---|", *rows])
