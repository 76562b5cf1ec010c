"""What is checked and set before any worker starts.

`check_checkpoint` and `check_port` need no SGLang, so that `dsv4 serve` refuses in seconds. However
the server is started, the host calls `check_source` and `resolve` while it resolves its arguments
in the main process.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import device, flags
from ..cache.layout import PAGE_TOKENS, WINDOW_SHARE
from ..checkpoint.files import CheckpointError, CheckpointFiles
from ..config import ARCHITECTURE, ConfigError, Geometry, Precision
from ..ops.operator import SelectionError, configure
from ..parallel import ParallelError, layout
from . import options, transfer
from .ledger import LedgerError, verify
from .lifetime import end_children, end_on_signals
from .refusal import first_line, refuse

logger = logging.getLogger(__name__)


_MTP = "EAGLE", "NEXTN"
"""The host's names for drafting with an MTP block: the second means the first."""

_HUB_SECONDS = 10
"""Time given to the Hugging Face hub to say whether it has a model."""


class LaunchError(ValueError):
    """Arguments that this package cannot serve with."""


def is_hub_name(model_path: str) -> bool:
    """Whether `model_path` can only be a name on the Hugging Face hub, as "owner/name" with no such
    directory here."""
    return (
        model_path.count("/") == 1
        and not model_path.startswith((".", "/", "~"))
        and not Path(model_path).exists()
    )


def check_checkpoint(
    model_path: str, tp_size: int = 1, ep_size: int = 1, attn_dp_size: int = 1, pp_size: int = 1
) -> None:
    """Config, weight files (headers only) and parallel layout of the model in directory
    `model_path`.

    Raises LaunchError, ConfigError, CheckpointError or ParallelError.
    """
    values = (tp_size, ep_size, attn_dp_size, pp_size)
    for size, value in zip(options.SIZES, values, strict=True):
        if value < 1:
            raise LaunchError(
                f"{size.name} {value} is no number of processes; it must be at least 1"
            )
        if size.field != "pp_size" and tp_size % value:
            raise LaunchError(f"{size.name} {value} does not divide --tp-size {tp_size}")
    geometry = Geometry.from_dir(model_path)
    if pp_size > geometry.num_hidden_layers:
        raise LaunchError(
            f"--pp-size {pp_size} is more than the {geometry.num_hidden_layers} layers of the model"
        )
    layout(tp_size, ep_size, attn_dp_size).check(geometry)
    CheckpointFiles(model_path).check(geometry)


def check_hub_name(name: str) -> None:
    """Raises LaunchError when `name` is neither in the cache of the Hugging Face hub nor on it."""
    if os.environ.get("SGLANG_USE_MODELSCOPE", "0").lower() in ("1", "true"):
        return
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_SECONDS)
    except Exception as error:  # of the hub's library and of the HTTP library below it
        raise LaunchError(
            f"there is no directory {name} here, and the Hugging Face hub does not give a model of"
            f" that name ({first_line(error)}); give the checkpoint's directory"
        ) from None


def check_words(model_path: str, words: Sequence[str]) -> None:
    """Raises LaunchError for the first of the host's options among `words` that this package cannot
    serve `model_path` with."""
    given = options.given(words)
    _check_options(model_path, given)
    _check_chunk(given.chunked_prefill_size, given.attn_dp_size or 1)
    if given.disaggregation_mode in ("prefill", "decode"):
        missing = transfer.missing_engine(given.disaggregation_transfer_backend or "mooncake")
        if missing:
            raise LaunchError(f"--disaggregation-mode {given.disaggregation_mode}: {missing}")


def check_device(words: Sequence[str]) -> None:
    """Raises LaunchError when neither `words`, arguments of the host, name a device nor a GPU is
    visible."""
    if device.arch() == device.CPU and "--device" not in {word.split("=")[0] for word in words}:
        raise LaunchError(
            "there is no GPU here; `dsv4 serve MODEL --cpu` serves on the CPU, and `dsv4 doctor`"
            " says what is missing where there should be one"
        )


def check_port(host: str, port: int) -> None:
    """Raises LaunchError when `port` cannot be bound on `host`."""
    if not 1 <= port <= 65535:
        raise LaunchError(f"{port} is no port to serve on; give one from 1 to 65535 with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise LaunchError(
            f"port {port} on {host} cannot be served on"
            f" ({os.strerror(error.errno) if error.errno else error}); give a free one with --port"
        ) from None


def _check_options(model_path: str, cfg: Any) -> None:
    for sentence in options.refusals(cfg):
        raise LaunchError(sentence)
    if (cfg.pp_size or 1) > 1:
        _check_pipeline(cfg)
    if cfg.speculative_algorithm is not None and _is_deepseek_v4(model_path):
        _check_draft(model_path, cfg)
    _check_copies_alone(cfg)
    _check_pool(cfg.max_total_tokens, cfg.swa_full_tokens_ratio or WINDOW_SHARE)


def _check_chunk(tokens: int | None, replicas: int) -> None:
    """The host gives each replica of the attention its part of a chunk."""
    if tokens is not None and tokens % (replicas * PAGE_TOKENS):
        raise LaunchError(
            f"--chunked-prefill-size {tokens} is shared by {replicas} replicas of the attention,"
            f" each in whole pages of {PAGE_TOKENS} tokens; give a multiple of"
            f" {replicas * PAGE_TOKENS}"
        )


def _check_pipeline(cfg: Any) -> None:
    for name, is_set, way_out in (
        ("--speculative-algorithm", cfg.speculative_algorithm is not None, "leave one of them out"),
        ("--attn-dp-size", (cfg.attn_dp_size or 1) > 1, "leave one of them out"),
        ("--enable-hierarchical-cache", cfg.enable_hierarchical_cache, "leave one of them out"),
        (
            "--disaggregation-mode",
            cfg.disaggregation_mode not in (None, "null"),
            "leave one of them out",
        ),
        ("DSV4_PROBE=1", flags.enabled("DSV4_PROBE"), "unset it: the probe takes whole steps"),
    ):
        if is_set:
            raise LaunchError(f"--pp-size {cfg.pp_size} is not served with {name}; {way_out}")


def _check_draft(model_path: str, cfg: Any) -> None:
    geometry, asked = Geometry.from_dir(model_path), cfg.speculative_algorithm
    named, draft = f"--speculative-algorithm {asked}", geometry.dspark
    if asked == "DSPARK" and draft is None:
        raise LaunchError(
            f"{named} needs a checkpoint with a DSpark draft, and {model_path} holds none; leave it"
            " out"
        )
    if asked in _MTP:
        _check_mtp(model_path, named, geometry)
    if cfg.enable_dp_attention or (cfg.attn_dp_size or 1) > 1:
        raise LaunchError(
            f"{named} is not served with data-parallel attention; leave one of them out"
        )
    if cfg.enable_streaming_session:
        raise LaunchError(
            "--speculative-algorithm DSPARK is not served with --enable-streaming-session: the host"
            " would begin the next turn after a token whose caches nobody wrote; leave one of them"
            " out"
        )
    if (cfg.disaggregation_mode or "null") != "null":
        raise LaunchError(
            f"{named} is not served with --disaggregation-mode {cfg.disaggregation_mode}; leave one"
            " of them out"
        )
    path, block = cfg.speculative_draft_model_path, cfg.speculative_dspark_block_size
    if path is not None and Path(path) != Path(model_path):
        raise LaunchError(
            f"--speculative-draft-model-path {path} cannot be served: the draft is that of the"
            f" model's own checkpoint, {model_path}; leave it out"
        )
    if draft is not None and block is not None and block > draft.block_size:
        raise LaunchError(
            f"--speculative-dspark-block-size {block} cannot be served: the draft of {model_path}"
            f" was trained on blocks of {draft.block_size} tokens; give at most that"
        )


def _check_mtp(model_path: str, named: str, geometry: Geometry) -> None:
    if geometry.dspark is not None:
        raise LaunchError(
            f"{named} drafts with an MTP block, and {model_path} holds a DSpark draft in its place:"
            " the host would draft with random weights. --speculative-algorithm DSPARK drafts with"
            " what is there"
        )
    if geometry.num_nextn_predict_layers != 1:
        raise LaunchError(
            f"{named} drafts with one MTP block, and {model_path} holds"
            f" {geometry.num_nextn_predict_layers}; leave it out"
        )


def _check_copies_alone(cfg: Any) -> None:
    """What copies pages of the pool was run by itself, over TCP or to the host's memory, not
    together with what changes the pool or who holds which part of it."""
    copies = {
        "--enable-hierarchical-cache": cfg.enable_hierarchical_cache,
        f"--disaggregation-mode {cfg.disaggregation_mode}": cfg.disaggregation_mode
        in ("prefill", "decode"),
    }
    others = {
        f"--speculative-algorithm {cfg.speculative_algorithm}": cfg.speculative_algorithm,
        f"--attn-dp-size {cfg.attn_dp_size}": (cfg.attn_dp_size or 1) > 1,
        f"--pp-size {cfg.pp_size}": (cfg.pp_size or 1) > 1,
    }
    asked = [name for name, on in copies.items() if on]
    asked += [name for name, on in others.items() if on] if asked else []
    if len(asked) > 1:
        raise LaunchError(
            f"{' and '.join(asked)} were never run together with this model; leave one of them out"
        )


def _check_pool(max_total_tokens: int | None, share: float) -> None:
    """A share of the pool holds the sliding windows, in whole pages. With fewer than four of them
    the host starts, and lets long prompts wait for ever."""
    least = 4 * PAGE_TOKENS
    if max_total_tokens is None:
        return
    windows = int(max_total_tokens * share) // PAGE_TOKENS * PAGE_TOKENS
    if windows < least:
        raise LaunchError(
            f"--max-total-tokens {max_total_tokens} leaves {windows} tokens for the sliding"
            f" windows, and a prompt can need {least}; give at least {math.ceil(least / share)}, or"
            f" more of them to the windows with --swa-full-tokens-ratio (here {share:g})"
        )


def check_arguments(cfg: Any) -> None:
    """Raises LaunchError for the first of the host's resolved arguments that this package cannot
    serve with."""
    _check_options(cfg.model_path, cfg)
    if cfg.device == "cpu":
        for sentence in options.refusals(cfg, options.CPU_OPTIONS):
            raise LaunchError(sentence)
        _check_host_memory_on_cpu(cfg)
    elif cfg.speculative_algorithm in _MTP:
        raise LaunchError(
            f"--speculative-algorithm {cfg.speculative_algorithm} was run on a CPU alone, where"
            " ours are in the place of the host's kernels for chains of drafts; leave it out on a"
            " GPU"
        )
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes", "y"):
        raise LaunchError(
            "SGLANG_RUST_SERVER takes requests in where they are not checked for this model; unset"
            " it"
        )
    mode = os.environ.get("SGLANG_RAGGED_VERIFY_MODE", "static")
    if cfg.speculative_algorithm and mode != "static" and cfg.device != "cpu":
        raise LaunchError(
            f"SGLANG_RAGGED_VERIFY_MODE={mode} cannot be served on a GPU: captured steps verify"
            " every drafted token; unset it"
        )
    precision = flags.precision()
    if cfg.pp_size > 1 and cfg.device != "cpu" and precision is not Precision.SERVING:
        raise LaunchError(
            f"--pp-size {cfg.pp_size} is not served with DSV4_PRECISION={precision.value} on a GPU:"
            " captured stages hand over bf16; unset one of them"
        )
    wanted = flags.read("DSV4_DEVICE")
    if (cfg.device == "cpu") != (wanted == "cpu"):
        raise LaunchError(
            f"the device is {cfg.device} while DSV4_DEVICE={wanted}; serving on a CPU needs both "
            "--device cpu and DSV4_DEVICE=cpu, which `dsv4 serve MODEL --cpu` sets"
        )


def _check_host_memory_on_cpu(cfg: Any) -> None:
    """The host's other ways to copy pages to its memory are kernels for GPUs."""
    words = options.CPU_HOST_MEMORY
    given = {
        "--hicache-io-backend": cfg.hicache_io_backend,
        "--hicache-mem-layout": cfg.hicache_mem_layout,
    }
    if cfg.enable_hierarchical_cache and given != words:
        raise LaunchError(
            "--enable-hierarchical-cache on a CPU needs"
            f" {' '.join(word for pair in words.items() for word in pair)}, which `dsv4 serve MODEL"
            f" --cpu` sets; here they are {' and '.join(given.values())}"
        )


def check_source(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Wraps the host's step that finds the model: refuses a DeepSeek-V4 model that cannot be
    served.

    The first step that knows the model, and before the host parses its config.json.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    previous(server_args)
    cfg = resolving_view(server_args)
    if not _is_deepseek_v4(cfg.model_path):
        return
    try:
        check_checkpoint(cfg.model_path, *(getattr(cfg, size.field) for size in options.SIZES))
        # An Engine in somebody's process binds no port, nor do the further nodes of a server.
        if "sglang.srt.entrypoints.engine" not in sys.modules and cfg.node_rank == 0:
            check_port(cfg.host, cfg.port)
    except (ConfigError, CheckpointError, ParallelError, LaunchError) as error:
        refuse(LaunchError(f"{error}. DSV4_PLUGIN=0 leaves the model to SGLang itself"))
    if cfg.speculative_algorithm in _MTP:
        _complete_chain(server_args, cfg)


def _complete_chain(server_args: Any, cfg: Any) -> None:
    """Says what drafting with an MTP block means, which the host asks of this model before it fills
    it in."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    steps = cfg.speculative_num_steps or 1
    given = {"speculative_num_steps": steps, "speculative_num_draft_tokens": steps + 1}
    if cfg.speculative_eagle_topk is None:
        given["speculative_eagle_topk"] = 1
    declare_resolution(server_args, "dsv4_plugin", speculative_algorithm=_MTP[0], **given)


def _is_deepseek_v4(model_path: str) -> bool:
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ARCHITECTURE in (config.get("architectures") or [])


def resolve(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Called by the host for a DeepSeek-V4 model: refuses arguments that cannot be served, returns
    those we decide.

    All plugins have loaded by then, so this is where the main process verifies the ledger.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    from .requests import check_requests

    cfg = resolving_view(server_args)
    try:
        check_requests(server_args)
        verify("in the main process")
        check_arguments(cfg)
        configure()
    except (LaunchError, LedgerError, SelectionError, flags.FlagError) as error:
        refuse(error)
    for sentence in options.without_effect(sys.argv[1:]):
        logger.warning("dsv4_plugin: %s", sentence)
    if cfg.device != "cpu":
        return _on_gpu(cfg)
    if cfg.disaggregation_mode == "prefill":
        transfer.set_cpu_environment()
    return {}


def _on_gpu(cfg: Any) -> dict[str, Any]:
    """What we decide on a GPU: decode steps are captured as the host does by default, prefills are
    not, nothing of FlashInfer is tuned, and the scheduler waits for our reads of its tables."""
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    # The fence is on by default on CUDA alone; without it ROCm has read tables of the next step.
    os.environ.setdefault("SGLANG_ENABLE_WAR_BARRIER", "1")
    return {
        "cuda_graph_config": with_phase(
            cfg.cuda_graph_config, Phase.PREFILL, backend=Backend.DISABLED
        ),
        "disable_flashinfer_autotune": True,
    }


def start_server(arguments: list[str]) -> None:
    """Runs the host's own server in this process with the arguments of its command line; returns
    when it ends.

    Raises LaunchError for arguments that the host refuses before it starts a process. What was
    started is ended, also when a signal ends this process.
    """
    end_on_signals()
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins

    load_plugins()
    try:
        run_server(server_args_of(arguments))
    finally:
        end_children()


def server_args_of(arguments: list[str]) -> Any:
    """The host's record of its arguments, resolved and checked by the host. Raises LaunchError."""
    from sglang.srt.server_args import prepare_server_args

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):  # the usage: hundreds of options
            server_args = prepare_server_args(arguments)
    except SystemExit as left:
        if not left.code:  # --help
            raise
        said = printed.getvalue().strip().rpartition("error: ")[2]
        raise LaunchError(f"SGLang does not understand its arguments: {said}") from None
    except Exception as error:  # of a file that --config names
        raise LaunchError(f"SGLang refuses these arguments: {first_line(error)}") from error
    sys.stderr.write(printed.getvalue())
    try:
        server_args.resolve_once()
        server_args.check_server_args()
    except Exception as error:  # asserts and errors of every kind: it has no class for these
        raise LaunchError(f"SGLang refuses these arguments: {first_line(error)}") from error
    _check_templates(server_args)
    _check_sampling(server_args.preferred_sampling_params)
    _check_parsers(server_args.reasoning_parser, server_args.tool_call_parser)
    return server_args


def _check_parsers(reasoning: str | None, tools: str | None) -> None:
    """The host reads thoughts and calls of this model in one pass, and says so when weights are
    loaded already."""
    given = {reasoning: "deepseek-v4", tools: "deepseekv4"}
    if len({value == native for value, native in given.items() if value}) == 2:
        raise LaunchError(
            f"--reasoning-parser {reasoning} and --tool-call-parser {tools} cannot be served"
            " together: deepseek-v4 goes with deepseekv4 alone. Give both of one kind, or leave one"
            " out"
        )


def _check_sampling(preferred: Any) -> None:
    """The host puts them into every request, its own first one included."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    try:
        params = SamplingParams(**(preferred or {}))
        params.normalize(None)
        params.verify(2**31)
    except (TypeError, ValueError) as error:
        raise LaunchError(f"--preferred-sampling-params cannot be served: {error}") from None


def _check_templates(server_args: Any) -> None:
    """The host looks for its templates when the weights are loaded already."""
    from sglang.srt.parser.code_completion_parser import completion_template_exists
    from sglang.srt.parser.conversation import chat_template_exists

    for option, value, exists, suffixes in (
        ("--chat-template", server_args.chat_template, chat_template_exists, (".jinja", ".json")),
        (
            "--completion-template",
            server_args.completion_template,
            completion_template_exists,
            (".json",),
        ),
    ):
        if value is None or exists(value):
            continue
        if not Path(value).is_file() or not value.endswith(suffixes):
            raise LaunchError(
                f"{option} {value} is neither a template of SGLang nor a file that ends in"
                f" {' or '.join(suffixes)}"
            )
        if value.endswith(".json"):
            try:
                json.loads(Path(value).read_text())
            except ValueError as error:
                raise LaunchError(f"{option} {value} is no JSON: {error}") from None
