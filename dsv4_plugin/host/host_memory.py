"""Pages of the pool in the host's memory (`--enable-hierarchical-cache`) where the device is a CPU.

SGLang keeps evicted pages there and copies them back, a layer at a time, when a prefix is met
again. Its own means are CUDA's runtime and sgl_kernel; on a CPU both memories are one, and plain
torch copies between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache import memory_pool_host
from sglang.srt.mem_cache.pool_host import base
from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
from torch import Tensor

from .ledger import Seam, attribute_seam


def allocate(
    dims: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    pin_memory: bool,
    allocator: Any,
    registration_granularity_bytes: int | None = None,
) -> Tensor:
    """The host's `alloc_with_host_register` for memory that no GPU reads: nothing is pinned."""
    return allocator.allocate(dims, dtype=dtype, device=device)


def copy_rows(
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """The host's `transfer_kv_direct`: row `dst_indices[i]` of each layer becomes row
    `src_indices[i]`. `page_size` says how many of them lie side by side, which changes nothing."""
    for source, target in zip(src_layers, dst_layers):
        target[dst_indices.long()] = source[src_indices.long()]


_COPY = "transfer_kv_direct"
_RESERVE = 2**30
"""Bytes of the machine's memory that the second tier leaves free: the host's 10 GiB are those of a
machine with GPUs."""

CPU_MEMORY_SEAMS: tuple[Seam, ...] = (
    Seam(
        target="sglang.srt.mem_cache.pool_host.common.ALLOC_MEMORY_FUNCS['cpu']",
        why="the host registers the memory of its second tier with CUDA's runtime",
        remove="the host registers memory only where the device is a GPU",
        test="tests/host/test_host_memory.py",
        value=allocate,
        take=lambda value: ALLOC_MEMORY_FUNCS.update(cpu=value),
        found=lambda: [ALLOC_MEMORY_FUNCS.get("cpu")],
    ),
    Seam(
        target=f"sglang.srt.mem_cache.memory_pool_host.{_COPY}",
        why="the host copies pages between its two memories with sgl_kernel alone",
        remove="the host copies with torch where sgl_kernel is not installed",
        test="tests/host/test_host_memory.py",
        value=copy_rows,
        take=lambda value: setattr(memory_pool_host, _COPY, value),
        found=lambda: [getattr(memory_pool_host, _COPY, None)],
    ),
    attribute_seam(
        base,
        "HICACHE_HOST_MEMORY_RESERVE_BYTES",
        _RESERVE,
        why="the host leaves 10 GiB of memory free, which small machines do not have",
        remove="the host has an option for it",
        test="tests/host/test_host_memory.py",
    ),
)
