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
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import device, flags
from ..checkpoint.files import CheckpointError, CheckpointFiles
from ..config import ARCHITECTURE, ConfigError, DSpark, Geometry
from ..ops.operator import SelectionError, configure
from ..parallel import Group, Parallel, ParallelError
from . import options
from .ledger import LedgerError, verify
from .lifetime import end_children, end_on_signals
from .refusal import refuse

logger = logging.getLogger(__name__)


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


def check_checkpoint(model_path: str, tp_size: int = 1, ep_size: int = 1) -> None:
    """Config, weight files (headers only) and parallel layout of the model in directory
    `model_path`.

    Raises LaunchError, ConfigError, CheckpointError or ParallelError.
    """
    for name, size in (("--tp-size", tp_size), ("--ep-size", ep_size)):
        if size < 1:
            raise LaunchError(f"{name} {size} is no number of processes; it must be at least 1")
    if tp_size % ep_size:
        raise LaunchError(f"--ep-size {ep_size} does not divide --tp-size {tp_size}")
    geometry = Geometry.from_dir(model_path)
    attention, expert = Group(size=tp_size), Group(size=ep_size)
    Parallel(attention, expert, Group(size=tp_size // ep_size), attention, attention).check(
        geometry
    )
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
            f" that name ({_first_line(error)}); give the checkpoint's directory"
        ) from None


def check_words(model_path: str, words: Sequence[str]) -> None:
    """Raises LaunchError for the first of the host's options among `words` that this package cannot
    serve `model_path` with."""
    _check_options(model_path, options.given(words))


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
    if cfg.speculative_algorithm in ("EAGLE", "NEXTN") and _dspark(model_path):
        raise LaunchError(
            f"--speculative-algorithm {cfg.speculative_algorithm} drafts with an MTP block, and"
            f" {model_path} holds a DSpark draft in its place: the host would draft with random"
            " weights. Leave it out; this version serves the model without its draft"
        )
    for sentence in options.refusals(cfg):
        raise LaunchError(sentence)


def check_arguments(cfg: Any) -> None:
    """Raises LaunchError for the first of the host's resolved arguments that this package cannot
    serve with."""
    _check_options(cfg.model_path, cfg)
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes", "y"):
        raise LaunchError(
            "SGLANG_RUST_SERVER takes requests in where they are not checked for this model; unset"
            " it"
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

    from .requests import check_requests

    cfg = resolving_view(server_args)
    try:
        check_requests(server_args)
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
    when it ends.

    Raises LaunchError for arguments that the host refuses before it starts a process. What was
    started is ended, also when a signal ends this process.
    """
    end_on_signals()
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins

    load_plugins()
    try:
        run_server(_server_args(arguments))
    finally:
        end_children()


def _server_args(arguments: list[str]) -> Any:
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
    sys.stderr.write(printed.getvalue())
    try:
        server_args.resolve_once()
        server_args.check_server_args()
    except Exception as error:  # asserts and errors of every kind: it has no class for these
        raise LaunchError(f"SGLang refuses these arguments: {_first_line(error)}") from error
    return server_args


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
