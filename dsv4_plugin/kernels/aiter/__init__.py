"""Kernels of aiter, AMD's package (github.com/ROCm/aiter, the distribution `amd-aiter`), behind the
operators' signatures, for comparison in one process.

Each file imports aiter and is imported only where its operator's flag names `aiter`. Written for
commit e4048607 of 2026-08-22; none of it ran (docs/kernels.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ...device import package_version

MODULES = {
    "block_fp8_linear": ("module_gemm_a8w8_blockscale", "module_quant"),
    "mhc_pre": ("module_mhc", "module_quant"),
    "mhc_post": ("module_mhc",),
    "mhc_post_pre": ("module_mhc", "module_quant"),
    "rms_norm_quant": ("module_fused_qk_rmsnorm_group_quant",),
    "rope_hadamard_quant": ("module_dsv4_rotate_quant",),
    "sample_greedy": ("module_sample",),
    "sparse_mla": (),
}
"""Modules that aiter compiles for an operator, by its `compile_ops`; attention is in Gluon."""


def require_arguments(function: Callable[..., Any], *names: str) -> None:
    """Raises ImportError unless `function` of aiter takes arguments of these names: aiter is built
    from source more often than released, and its version says little."""
    known = inspect.signature(function).parameters
    lacking = [name for name in names if name not in known]
    if lacking:
        raise ImportError(
            f"{function.__name__} of aiter {package_version('amd-aiter')} has no argument"
            f" {', '.join(lacking)}; this was written for aiter at commit e4048607"
        )
