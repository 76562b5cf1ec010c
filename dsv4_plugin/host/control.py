"""Endpoints that change a running server: each works, or is refused with status 400 and one
sentence before anything changes.

They are methods of the host's `TokenizerManager`, which HTTP and the in-process `Engine` both call.
Most of them only send a message; what fails on it in the scheduler ends the server.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from .. import device, flags
from ..checkpoint.files import CheckpointError
from ..config import ConfigError, Geometry
from .ledger import Seam, attribute_seam
from .model import model_directory
from .weight_update import check_weights

LONGEST_SLEEP = 60.0
"""Seconds that /slow_down may add to a step; the host's watchdog ends a step after 300."""
_WHOLE = "weights are loaded whole, from a directory: use /update_weights_from_disk"
_MEMORY = "this package does not give the memory of its weights and caches back"
_EXPERTS = "the experts of a token are not recorded"

REFUSED: dict[str, str] = {
    "begin_weight_update": _WHOLE,
    "end_weight_update": _WHOLE,
    "init_weights_update_group": _WHOLE,
    "destroy_weights_update_group": _WHOLE,
    "update_weights_from_distributed": _WHOLE,
    "update_weights_from_tensor": _WHOLE,
    "update_weights_from_ipc": _WHOLE,
    "init_weights_send_group_for_remote_instance": _WHOLE,
    "send_weights_to_remote_instance": _WHOLE,
    "get_weights_by_name": "the weights are packed as in the checkpoint; read them there",
    "release_memory_occupation": _MEMORY,
    "resume_memory_occupation": _MEMORY,
    "start_expert_distribution_record": _EXPERTS,
    "stop_expert_distribution_record": _EXPERTS,
    "dump_expert_distribution_record": _EXPERTS,
    "scale_elastic_ep": "the number of processes is fixed at the start",
    "pd_role_switch": "a server keeps the --disaggregation-mode that it was started with",
    "clear_hicache_storage": "pages go to the host's memory and no further",
    "attach_hicache_storage": "pages go to the host's memory and no further",
    "detach_hicache_storage": "pages go to the host's memory and no further",
}
"""Methods of the host behind endpoints that cannot work with this model, and why."""


class RequestRefused(HTTPException, ValueError):
    """A request that is refused; over HTTP, status 400."""

    def __init__(self, why: str):
        super().__init__(status_code=400, detail=why)

    def __str__(self) -> str:
        return self.detail


def _check_profile(manager: TokenizerManager, request: Any = None) -> None:
    """On a CPU only its activity can be recorded; the host asks for a GPU's too by default."""
    cpu = device.arch() == device.CPU or flags.read("DSV4_DEVICE") == "cpu"
    known = {"CPU"} if cpu else {"CPU", "GPU", "MEM", "RPD"}
    other = set((request and request.activities) or ()) - known
    if other:
        raise RequestRefused(
            f"activities {', '.join(sorted(other))} cannot be recorded here;"
            f" there is {', '.join(sorted(known))}"
        )
    if request is None:
        return
    if request.activities is None and cpu:
        request.activities = ["CPU"]
    for name in ("start_step", "num_steps"):
        value = getattr(request, name)
        if value is not None and not 0 < value < 2**31:
            raise RequestRefused(f"{name} must be a number of steps of at least 1, got {value}")
    _check_folder(request.output_dir or os.environ.get("SGLANG_TORCH_PROFILER_DIR", "/tmp"))


def _check_folder(folder: str) -> None:
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestRefused(f"nothing can be written to {folder}: {error}") from None
    if not os.access(place, os.W_OK):
        raise RequestRefused(f"nothing can be written to {folder}")


def _check_update(manager: TokenizerManager, request: Any, *rest: Any) -> None:
    if request.load_format not in (None, "auto", "safetensors"):
        raise RequestRefused(f"load_format {request.load_format} is not read; leave it out")
    served = model_directory(manager.model_path, manager.model_config.revision)
    try:
        check_weights(request.model_path, Geometry.from_dir(served))
    except (ConfigError, CheckpointError, OSError) as error:
        raise RequestRefused(str(error)) from None


def _check_slow_down(manager: TokenizerManager, request: Any, *rest: Any) -> None:
    seconds = request.forward_sleep_time
    if seconds is not None and not seconds <= LONGEST_SLEEP:
        raise RequestRefused(
            f"forward_sleep_time must be at most {LONGEST_SLEEP:g} seconds, got {seconds}"
        )


def _no_check(manager: TokenizerManager, *arguments: Any) -> None:
    """For methods of the host whose own refusals need only the right status."""


def _check_logging(manager: TokenizerManager, request: Any) -> None:
    """The host takes the values first and fails on them at every later request."""
    for name, known in (
        ("log_requests_level", (0, 1, 2, 3)),
        ("log_requests_format", ("text", "json")),
        ("log_level", ("debug", "info", "warning", "error", "critical")),
    ):
        value = getattr(request, name)
        if value is not None and value not in known:
            raise RequestRefused(
                f"{name} must be one of {', '.join(map(str, known))}, got {value!r}"
            )
    for folder in (request.dump_requests_folder, request.crash_dump_folder):
        if folder:
            _check_folder(folder)


def _check_weights_checker(manager: TokenizerManager, request: Any, *rest: Any) -> None:
    if request.action == "reset_tensors":
        raise RequestRefused("reset_tensors would serve random weights")


CHECKED: dict[str, Callable[..., Any]] = {
    "start_profile": _check_profile,
    "stop_profile": _no_check,
    "update_weights_from_disk": _check_update,
    "slow_down": _check_slow_down,
    "configure_logging": _check_logging,
    "check_weights": _check_weights_checker,
}
"""Methods that work for some requests."""


def _refuse(why: str) -> Callable[..., Any]:
    def refuse(manager: TokenizerManager, *arguments: Any, **named: Any) -> None:
        raise RequestRefused(why)

    return refuse


def _seam(name: str, check: Callable[..., Any]) -> Seam:
    host = getattr(TokenizerManager, name)

    @functools.wraps(host)
    async def checked(manager: TokenizerManager, *arguments: Any, **named: Any) -> Any:
        check(manager, *arguments, **named)
        try:
            return await host(manager, *arguments, **named)
        except RuntimeError as error:  # how the host says that it could not do it
            raise RequestRefused(str(error)) from error

    @functools.wraps(host)
    def checked_at_once(manager: TokenizerManager, *arguments: Any, **named: Any) -> Any:
        check(manager, *arguments, **named)
        return host(manager, *arguments, **named)

    return attribute_seam(
        TokenizerManager,
        name,
        checked if inspect.iscoroutinefunction(host) else checked_at_once,
        why="what the model or the platform lacks is refused; in the scheduler it ends the server",
        remove="the host refuses it",
        test="tests/host/test_requests.py",
    )


CONTROL_SEAMS: tuple[Seam, ...] = tuple(
    _seam(name, check)
    for name, check in {
        **{name: _refuse(why) for name, why in REFUSED.items()},
        **CHECKED,
    }.items()
)
