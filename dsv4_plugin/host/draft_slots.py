"""The host's bookkeeping of slots for drafted tokens, on tensors of a CPU: for both of its workers
(dspark_worker.py, mtp_worker.py)."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache import allocation
from torch import Tensor

from .ledger import attribute_seam


def assign_req_to_token_pool(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    batch_size: int,
) -> None:
    """Puts new slots into the host's table: those of request r, one after the other in
    `out_cache_loc`, at its positions `start_offset[r]` to `end_offset[r]` - 1."""
    counts = (end_offset - start_offset).tolist()
    rows = zip(req_pool_indices.tolist(), start_offset.tolist(), out_cache_loc.split(counts))
    for row, start, slots in rows:
        req_to_token[row, start : start + len(slots)] = slots


def cache_locs(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> Tensor:
    """int64 [R·n]: slots of the `draft_token_num` positions from `start_offset` [R] of each
    request, as the host's table has them."""
    position = start_offset.unsqueeze(1) + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices.unsqueeze(1), position].flatten().to(torch.int64)


SLOT_SEAMS = (
    attribute_seam(
        allocation,
        "get_last_loc",
        allocation.get_last_loc_torch,
        why="the host asks the name of the attention backend whether there is Triton",
        remove="the host asks the platform whether there is Triton",
        test="tests/host/test_dspark.py",
    ),
    attribute_seam(
        allocation,
        "assign_req_to_token_pool_func",
        assign_req_to_token_pool,
        why="the host's function without Triton is in its CPU build of sgl_kernel",
        remove="the host asks the platform for the function, as it does for the cache locations",
        test="tests/host/test_dspark.py",
    ),
)
"""Taken where a worker is built."""
