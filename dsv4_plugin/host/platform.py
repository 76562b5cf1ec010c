"""CPU platform for SGLang, active only when DSV4_DEVICE=cpu.

SGLang's own CPU path needs a CPU build of sgl_kernel, which no registry carries. As an out-of-tree
platform on device "cpu" the unmodified wheel serves on any machine: this package needs none of
those kernels.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from torch import Tensor
from torch.profiler import ProfilerActivity

from .. import flags
from .refusal import refuse


def activate() -> str | None:
    """Entry point of group `sglang.srt.platforms`: the platform's class path when asked for, else
    None."""
    try:
        wanted = flags.enabled("DSV4_PLUGIN") and flags.read("DSV4_DEVICE") == "cpu"
    except flags.FlagError as error:
        refuse(error)
    return f"{__name__}:{CpuPlatform.__name__}" if wanted else None


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Eager serving on the CPU: torch-native allocators, gloo collectives, no Triton, no graphs."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "dsv4"

    def get_device(self, device_id: int = 0) -> str:
        # The host compares the device with strings; a torch.device would compare unequal.
        return self.device_type

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> ProfilerActivity:
        return ProfilerActivity.CPU

    def is_pin_memory_available(self, device=None) -> bool:
        return False

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ("DSPARK", "EAGLE")

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        if algorithm == "DSPARK":
            from .dspark_worker import DSparkWorker  # the host's scheduler must be there first

            return DSparkWorker
        if algorithm == "EAGLE":
            from .mtp_worker import MTPWorker

            return MTPWorker
        return None

    def get_speculative_cache_locs_fn(self) -> Callable[..., Tensor]:
        from .draft_slots import cache_locs

        return cache_locs
