"""Greedy choice of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import Implementation, operator


@operator
def sample_greedy(logits: Tensor) -> Tensor:
    """int64 [T]: the lowest token id among the largest `logits` [T, vocab].

    NaN is never chosen; a row of nothing else, or of nothing but -inf, gives 0.
    """
    logits = logits.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    ids = torch.arange(logits.shape[1], device=logits.device)
    largest = logits == logits.amax(-1, keepdim=True)
    return torch.where(largest, ids, logits.shape[1]).amin(-1)


def _needs_side_by_side(logits: Tensor) -> str | None:
    if logits.dtype not in (torch.float32, torch.bfloat16):
        return f"the logits are {logits.dtype}, neither float32 nor bfloat16"
    return None if logits.stride(-1) == 1 else "the logits of a row do not lie side by side"


sample_greedy.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.sample_greedy:sample_greedy",
        packages=("triton",),
        requires=_needs_side_by_side,
    )
)
