"""Every place where this package reaches into SGLang, one record each. Those that check requests
are in requests.py and control.py, that of the sampler in sampler.py."""

from __future__ import annotations

from sglang.srt.arg_groups import model_override_base, resolution_hooks
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.platforms import current_platform
from sglang.srt.platforms.interface import reject_out_of_tree_path

from ..config import ARCHITECTURE
from .backend import create_backend
from .launch import check_source, resolve
from .ledger import Seam
from .model import DeepseekV4ForCausalLM
from .platform import CpuPlatform
from .weight_update import update_weights_from_disk

BACKEND = "dsv4"
_SOURCE_STEP = "handle_model_source_paths"
_POOL = "the DeepSeek-V4 KV pool"


def _allow_pool_on_cpu(platform, *, subsystem: str) -> None:
    """The host's `reject_out_of_tree_path`, except that our CPU platform may build the DeepSeek-V4
    pool."""
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
        why=(
            "the host forces this backend name for the architecture; ours builds the step plan our"
            " model reads"
        ),
        remove="the host lets a model name its own backend",
        test="tests/host/test_ledger.py",
        value=create_backend,
        take=lambda value: ATTENTION_BACKENDS.update({BACKEND: value}),
        found=lambda: [ATTENTION_BACKENDS.get(BACKEND)],
    ),
    Seam(
        target=f"sglang.srt.arg_groups.resolution_hooks.register_resolution_hook({_SOURCE_STEP!r})",
        why=(
            "checkpoint, layout and port are checked in the main process, before the host parses"
            " the config"
        ),
        remove="never: this is the host's registry for it",
        test="tests/host/test_wrong_input.py",
        value=check_source,
        take=lambda value: resolution_hooks.register_resolution_hook(_SOURCE_STEP)(value),
        found=lambda: resolution_hooks._HOOKS.get(_SOURCE_STEP, ()),
    ),
    Seam(
        target=(
            f"sglang.srt.arg_groups.model_override_base.register_model_override({ARCHITECTURE!r})"
        ),
        why=(
            "arguments are checked in the main process, before any worker starts, and prefill"
            " graphs are turned off"
        ),
        remove="never: this is the host's registry for it",
        test="tests/host/test_wrong_input.py",
        value=resolve,
        take=lambda value: model_override_base.register_model_override(ARCHITECTURE)(value),
        found=lambda: model_override_base._MODEL_OVERRIDE_FNS.get(ARCHITECTURE, ()),
    ),
    Seam(
        target=(
            "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
            ".update_weights_from_disk"
        ),
        why="weights of another model, or files that end early, never serve, not even in part",
        remove="the host checks files before it loads them, and goes back to those it served",
        test="tests/host/test_weight_update.py",
        value=update_weights_from_disk,
        take=lambda value: setattr(WeightUpdater, "update_weights_from_disk", value),
        found=lambda: [WeightUpdater.update_weights_from_disk],
    ),
)

CPU_SEAMS: tuple[Seam, ...] = (
    Seam(
        target="sglang.srt.mem_cache.kv_cache_configurator.reject_out_of_tree_path",
        why=(
            "the host refuses its DeepSeek-V4 pool on every out-of-tree platform, though it is"
            " plain torch"
        ),
        remove="SRTPlatform.get_kv_pool_cls takes kind='dsv4'",
        test="tests/host/test_ledger.py",
        value=_allow_pool_on_cpu,
        take=lambda value: setattr(kv_cache_configurator, "reject_out_of_tree_path", value),
        found=lambda: [kv_cache_configurator.reject_out_of_tree_path],
    ),
)


def seams() -> tuple[Seam, ...]:
    """The seams that every process takes when it loads plugins.

    That of the CPU platform only where it is active and SGLang has no seam of its own (patch
    `pool-platform-seam`).
    """
    cpu = (
        isinstance(current_platform, CpuPlatform)
        and "dsv4" not in kv_cache_configurator._KV_POOL_BASE_FOR_KIND
    )
    return SEAMS + (CPU_SEAMS if cpu else ())
