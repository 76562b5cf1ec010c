"""Every place where this package reaches into SGLang, one record each. Those that check requests
are in requests.py and control.py, that of the sampler in sampler.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from sglang.srt.arg_groups import model_override_base, resolution_hooks, speculative_hook
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.model_executor import forward_batch_info
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.platforms import current_platform
from sglang.srt.platforms.interface import reject_out_of_tree_path
from sglang.srt.utils.common import kill_itself_when_parent_died

from ..config import ARCHITECTURE
from .backend import create_backend
from .dspark import DeepseekV4ForCausalLMDSpark
from .launch import check_source, resolve
from .ledger import Seam, attribute_seam
from .lifetime import end_if_orphaned
from .model import DeepseekV4ForCausalLM
from .mtp import DeepseekV4ForCausalLMNextN
from .platform import CpuPlatform
from .profile import SchedulerProfilerManager, profile
from .weight_update import update_weights_from_disk

BACKEND = "dsv4"
DSPARK = "DeepseekV4ForCausalLMDSpark"
"""The host's name for the draft of a checkpoint with `dspark_*` in its config.json."""
MTP = "DeepseekV4ForCausalLMNextN"
"""The host's name for the draft of a checkpoint with an MTP block."""
_SOURCE_STEP = "handle_model_source_paths"
_POOL = "the DeepSeek-V4 KV pool"
_SCHEDULER = "sglang.srt.managers.scheduler"


def _allow_pool_on_cpu(platform, *, subsystem: str) -> None:
    """The host's `reject_out_of_tree_path`, except that our CPU platform may build the DeepSeek-V4
    pool."""
    if subsystem == _POOL and isinstance(platform, CpuPlatform):
        return
    reject_out_of_tree_path(platform, subsystem=subsystem)


def _end_with_parent() -> None:
    """The host's `kill_itself_when_parent_died`, also where the parent died before."""
    kill_itself_when_parent_died()
    end_if_orphaned()


@dataclass
class _OnGpu:
    """The host's arguments, as if the device were a GPU."""

    arguments: Any
    device: str = "cuda"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.arguments, name)


host_handle_dspark = speculative_hook._handle_dspark


def _handle_dspark_on_cpu(server_args: Any) -> None:
    """The host's checks and defaults for DSPARK, which it begins by refusing every CPU."""
    view = speculative_hook.resolving_view
    speculative_hook.resolving_view = lambda arguments: _OnGpu(view(arguments))
    try:
        host_handle_dspark(server_args)
    finally:
        speculative_hook.resolving_view = view


def _constructed(architecture: str, value: type, what: str, test: str) -> Seam:
    """The host's registry holds `value` for `architecture`."""
    return Seam(
        target=f"sglang.srt.models.registry.ModelRegistry.models[{architecture!r}]",
        why=f"the host constructs our {what} instead of its own",
        remove="never: this is the host's registry for it",
        test=test,
        value=value,
        take=lambda value: ModelRegistry.models.update({architecture: value}),
        found=lambda: [ModelRegistry.models.get(architecture)],
    )


SEAMS: tuple[Seam, ...] = (
    _constructed(
        ARCHITECTURE,
        DeepseekV4ForCausalLM,
        "model for this architecture",
        "tests/host/test_ledger.py",
    ),
    _constructed(
        DSPARK,
        DeepseekV4ForCausalLMDSpark,
        "stages for a DSpark draft",
        "tests/host/test_dspark.py",
    ),
    _constructed(
        MTP, DeepseekV4ForCausalLMNextN, "MTP block for a draft", "tests/host/test_mtp.py"
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
    attribute_seam(
        WeightUpdater,
        "update_weights_from_disk",
        update_weights_from_disk,
        why="weights of another model, or files that end early, never serve, not even in part",
        remove="the host checks files before it loads them, and goes back to those it served",
        test="tests/host/test_weight_update.py",
    ),
    attribute_seam(
        SchedulerProfilerManager,
        "_profile",
        profile,
        why="a profile that cannot be started or written is refused; it would end the scheduler",
        remove="the host refuses a second start and catches what its profilers raise",
        test="tests/host/test_api.py",
    ),
)

CPU_POOL = attribute_seam(
    kv_cache_configurator,
    "reject_out_of_tree_path",
    _allow_pool_on_cpu,
    why=(
        "the host refuses its DeepSeek-V4 pool on every out-of-tree platform, though it is"
        " plain torch"
    ),
    remove="SRTPlatform.get_kv_pool_cls takes kind='dsv4'",
    test="tests/host/test_ledger.py",
)

CPU_DSPARK = attribute_seam(
    speculative_hook,
    "_handle_dspark",
    _handle_dspark_on_cpu,
    why="the host refuses DSPARK on a CPU before it asks the platform for a worker",
    remove="the host asks SRTPlatform.supports_speculative_algorithm for DSPARK as well",
    test="tests/host/test_dspark.py",
)

CPU_PINNED = attribute_seam(
    forward_batch_info,
    "_is_cpu",
    True,
    why="rows of attention replicas are counted in pinned memory, which a CPU does not have",
    remove="forward_batch_info asks the platform, as the patch pinned-memory-by-platform does",
    test="tests/host/test_layouts.py",
)


def _scheduler_seam() -> Seam:
    return attribute_seam(
        sys.modules[_SCHEDULER],
        "kill_itself_when_parent_died",
        _end_with_parent,
        why="a scheduler whose parent died while it imported would wait for the other ranks",
        remove="the host looks for its parent once it has asked to end with it",
        test="tests/host/test_lifetime.py",
    )


def seams() -> tuple[Seam, ...]:
    """The seams that every process takes when it loads plugins.

    Those of the CPU platform only where it is active, that of the pool only where SGLang has no
    seam of its own (patch `pool-platform-seam`); that of the scheduler only where its module is
    loaded: it takes seconds.
    """
    taken = list(SEAMS)
    if isinstance(current_platform, CpuPlatform):
        if "dsv4" not in kv_cache_configurator._KV_POOL_BASE_FOR_KIND:
            taken.append(CPU_POOL)
        taken += (CPU_PINNED, CPU_DSPARK)
    if _SCHEDULER in sys.modules:
        taken.append(_scheduler_seam())
    return tuple(taken)
