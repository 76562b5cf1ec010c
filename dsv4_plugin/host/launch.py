"""What is checked and set before any worker starts.

`check_checkpoint` and `check_port` need no SGLang, so that `dsv4 serve` refuses in seconds. However
the server is started, the host calls `check_source` and `resolve` while it resolves its arguments
in the main process.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import flags
from ..checkpoint.files import CheckpointError, CheckpointFiles
from ..config import ARCHITECTURE, ConfigError, DSpark, Geometry
from ..ops.operator import SelectionError, configure
from ..parallel import Group, Parallel, ParallelError
from .ledger import LedgerError, take, verify
from .refusal import refuse

logger = logging.getLogger(__name__)


class LaunchError(ValueError):
    """Arguments that this package cannot serve with."""


_UNSUPPORTED = (
    ("--pp-size", lambda cfg: cfg.pp_size > 1),
    ("--attn-dp-size", lambda cfg: cfg.attn_dp_size > 1 or cfg.enable_dp_attention),
    ("--attn-cp-size", lambda cfg: cfg.attn_cp_size > 1 or cfg.enable_prefill_cp),
    ("--dcp-size", lambda cfg: cfg.dcp_size > 1),
    ("--moe-dp-size", lambda cfg: cfg.moe_dp_size > 1),
    ("--moe-a2a-backend", lambda cfg: cfg.moe_a2a_backend != "none"),
    ("--enable-eplb", lambda cfg: cfg.enable_eplb),
    ("--enable-two-batch-overlap", lambda cfg: cfg.enable_two_batch_overlap),
    ("--enable-lora", lambda cfg: bool(cfg.enable_lora)),
    ("--enable-hisparse", lambda cfg: cfg.enable_hisparse),
    ("--enable-hierarchical-cache", lambda cfg: cfg.enable_hierarchical_cache),
    ("--disaggregation-mode", lambda cfg: cfg.disaggregation_mode != "null"),
    ("--speculative-algorithm", lambda cfg: cfg.speculative_algorithm is not None),
    ("--dtype", lambda cfg: cfg.dtype not in ("auto", "bfloat16")),
    ("--quantization", lambda cfg: cfg.quantization not in (None, "fp8")),
    ("--kv-cache-dtype", lambda cfg: cfg.kv_cache_dtype not in ("auto", "fp8_e4m3")),
    ("--json-model-override-args", lambda cfg: cfg.json_model_override_args not in ("", "{}")),
)
"""Arguments of the host that this package does not act on, and when they ask for something it does
not do."""


def is_hub_name(model_path: str) -> bool:
    """Whether `model_path` can only be a name on the Hugging Face hub, as "owner/name" with no such
    directory here."""
    return (
        model_path.count("/") == 1
        and not model_path.startswith((".", "/", "~"))
        and not Path(model_path).exists()
    )


def check_checkpoint(model_path: str, tp_size: int = 1, ep_size: int = 1) -> None:
    """Config, weight files (headers only) and parallel layout of the model in directory
    `model_path`.

    Raises LaunchError, ConfigError, CheckpointError or ParallelError.
    """
    if tp_size < 1 or ep_size < 1 or tp_size % ep_size:
        raise LaunchError(f"--ep-size {ep_size} does not divide --tp-size {tp_size}")
    geometry = Geometry.from_dir(model_path)
    attention, expert = Group(size=tp_size), Group(size=ep_size)
    Parallel(attention, expert, Group(size=tp_size // ep_size), attention, attention).check(
        geometry
    )
    CheckpointFiles(model_path).check(geometry)


def check_port(host: str, port: int) -> None:
    """Raises LaunchError when `port` cannot be bound on `host`."""
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


def check_arguments(cfg: Any) -> None:
    """Raises LaunchError for the first of the host's resolved arguments that this package cannot
    serve with."""
    if cfg.speculative_algorithm in ("EAGLE", "NEXTN") and _dspark(cfg.model_path):
        raise LaunchError(
            f"--speculative-algorithm {cfg.speculative_algorithm} drafts with an MTP block, and"
            f" {cfg.model_path} holds a DSpark draft in its place: the host would draft with random"
            " weights. Leave it out; this version serves the model without its draft"
        )
    for name, is_set in _UNSUPPORTED:
        if is_set(cfg):
            raise LaunchError(
                f"{name} asks for what dsv4_plugin does not do. Leave it out, or set DSV4_PLUGIN=0"
                " to serve with SGLang's own DeepSeek-V4"
            )
    wanted = flags.read("DSV4_DEVICE")
    if (cfg.device == "cpu") != (wanted == "cpu"):
        raise LaunchError(
            f"the device is {cfg.device} while DSV4_DEVICE={wanted}; serving on a CPU needs both "
            "--device cpu and DSV4_DEVICE=cpu, which `dsv4 serve MODEL --cpu` sets"
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
        check_checkpoint(cfg.model_path, cfg.tp_size, cfg.ep_size)
        # An Engine in somebody's process binds no port, nor do the further nodes of a server.
        if "sglang.srt.entrypoints.engine" not in sys.modules and cfg.node_rank == 0:
            check_port(cfg.host, cfg.port)
    except (ConfigError, CheckpointError, ParallelError, LaunchError) as error:
        refuse(LaunchError(f"{error}. DSV4_PLUGIN=0 leaves the model to SGLang itself"))


def _is_deepseek_v4(model_path: str) -> bool:
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ARCHITECTURE in (config.get("architectures") or [])


def _dspark(model_path: str) -> DSpark | None:
    """The draft of the model in directory `model_path`; None for one without, or not here yet."""
    return Geometry.from_dir(model_path).dspark if _is_deepseek_v4(model_path) else None


def resolve(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Called by the host for a DeepSeek-V4 model: refuses arguments that cannot be served, returns
    those we decide.

    All plugins have loaded by then, so this is where the main process verifies the ledger.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    from .requests import DOOR

    cfg = resolving_view(server_args)
    try:
        take([DOOR])
        verify("in the main process")
        check_arguments(cfg)
        configure()
    except (LaunchError, LedgerError, SelectionError, flags.FlagError) as error:
        refuse(error)
    return {} if cfg.device == "cpu" else _on_gpu(cfg)


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
    when it ends."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
