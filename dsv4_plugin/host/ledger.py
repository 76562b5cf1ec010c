"""Every place where this package reaches into SGLang, one record each.

SGLang swallows a plugin's exceptions and logs a missing hook target: a plugin that did not load looks exactly like the
stock server. So each seam says how it is verified, and `verify` is called where the process depends on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sglang.srt.arg_groups import model_override_base, resolution_hooks
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.platforms import current_platform
from sglang.srt.platforms.interface import reject_out_of_tree_path

from .. import flags
from ..config import ARCHITECTURE
from .backend import create_backend
from .launch import check_source, resolve
from .model import DeepseekV4ForCausalLM
from .platform import CpuPlatform
from .version import SUPPORTED

logger = logging.getLogger(__name__)

BACKEND = "dsv4"
_SOURCE_STEP = "handle_model_source_paths"
_POOL = "the DeepSeek-V4 KV pool"


class LedgerError(RuntimeError):
    """Seams that were taken but do not hold."""


@dataclass(frozen=True)
class Seam:
    """One reach into the host: `value` is what we put there."""

    target: str
    why: str
    remove: str
    """What the host must offer for this record to go."""
    test: str
    value: Any
    """Kept here and not looked up by name: the host's hooks rewrite every module's name of what they replace."""
    take: Callable[[Any], object]
    found: Callable[[], Iterable[Any]]
    """What the host has there now."""
    versions: str = str(SUPPORTED)

    def holds(self) -> bool:
        return any(found is self.value for found in self.found())


def _allow_pool_on_cpu(platform, *, subsystem: str) -> None:
    """The host's `reject_out_of_tree_path`, except that our CPU platform may build the DeepSeek-V4 pool."""
    if subsystem == _POOL and isinstance(platform, CpuPlatform):
        return
    reject_out_of_tree_path(platform, subsystem=subsystem)


SEAMS: tuple[Seam, ...] = (
    Seam(
        target=f"sglang.srt.models.registry.ModelRegistry.models[{ARCHITECTURE!r}]",
        why="the host constructs our model for this architecture instead of its own",
        remove="never: this is the host's registry for it",
        test="tests/host/test_ledger.py",
        value=DeepseekV4ForCausalLM,
        take=lambda value: ModelRegistry.models.update({ARCHITECTURE: value}),
        found=lambda: [ModelRegistry.models.get(ARCHITECTURE)],
    ),
    Seam(
        target=f"sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS[{BACKEND!r}]",
        why="the host forces this backend name for the architecture; ours builds the step plan our model reads",
        remove="the host lets a model name its own backend",
        test="tests/host/test_ledger.py",
        value=create_backend,
        take=lambda value: ATTENTION_BACKENDS.update({BACKEND: value}),
        found=lambda: [ATTENTION_BACKENDS.get(BACKEND)],
    ),
    Seam(
        target=f"sglang.srt.arg_groups.resolution_hooks.register_resolution_hook({_SOURCE_STEP!r})",
        why="checkpoint, layout and port are checked in the main process, before the host parses the config",
        remove="never: this is the host's registry for it",
        test="tests/host/test_wrong_input.py",
        value=check_source,
        take=lambda value: resolution_hooks.register_resolution_hook(_SOURCE_STEP)(value),
        found=lambda: resolution_hooks._HOOKS.get(_SOURCE_STEP, ()),
    ),
    Seam(
        target=f"sglang.srt.arg_groups.model_override_base.register_model_override({ARCHITECTURE!r})",
        why="arguments are checked in the main process, before any worker starts, and graphs are turned off",
        remove="never: this is the host's registry for it",
        test="tests/host/test_wrong_input.py",
        value=resolve,
        take=lambda value: model_override_base.register_model_override(ARCHITECTURE)(value),
        found=lambda: model_override_base._MODEL_OVERRIDE_FNS.get(ARCHITECTURE, ()),
    ),
)

CPU_SEAMS: tuple[Seam, ...] = (
    Seam(
        target="sglang.srt.mem_cache.kv_cache_configurator.reject_out_of_tree_path",
        why="the host refuses its DeepSeek-V4 pool on every out-of-tree platform, though it is plain torch",
        remove="SRTPlatform.get_kv_pool_cls takes kind='dsv4'",
        test="tests/host/test_ledger.py",
        value=_allow_pool_on_cpu,
        take=lambda value: setattr(kv_cache_configurator, "reject_out_of_tree_path", value),
        found=lambda: [kv_cache_configurator.reject_out_of_tree_path],
    ),
)


def _door() -> Seam:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from .requests import validate_request

    return Seam(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        why="a token id outside the vocabulary is refused, not looked up: that would end the scheduler",
        remove="the host checks the ids of a request",
        test="tests/host/test_serving.py",
        value=validate_request,
        take=lambda value: setattr(TokenizerManager, "_validate_one_request", value),
        found=lambda: [TokenizerManager._validate_one_request],
    )


_door_is_ours = False


def seams() -> tuple[Seam, ...]:
    """The seams this process needs: those of the CPU platform only where it is active and the host has no seam of its
    own (the patch `pool-platform-seam`), that of the door only where requests come in."""
    cpu = isinstance(current_platform, CpuPlatform) and "dsv4" not in kv_cache_configurator._KV_POOL_BASE_FOR_KIND
    return SEAMS + (CPU_SEAMS if cpu else ()) + ((_door(),) if _door_is_ours else ())


def take() -> None:
    """Takes every seam of this process."""
    for seam in seams():
        seam.take(seam.value)


def take_door() -> None:
    """Takes the seam of the process that requests come in at; its module is not loaded in any other."""
    global _door_is_ours
    _door().take(_door().value)
    _door_is_ours = True


def verify(where: str) -> None:
    """Checks by identity that every seam holds.

    One that does not, for example because another plugin took it later, is logged as an error; with DSV4_STRICT=1
    it raises LedgerError. `where` says in the message at what point this was found.
    """
    unmet = [seam for seam in seams() if not seam.holds()]
    if not unmet:
        return
    message = f"dsv4_plugin: {where}, {len(unmet)} of its seams do not hold: " + "; ".join(
        f"{seam.target} ({seam.why})" for seam in unmet)
    if flags.enabled("DSV4_STRICT"):
        raise LedgerError(message)
    logger.error(message)
