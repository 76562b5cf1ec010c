"""Greedy choice of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parallel import Group
from .operator import Implementation, operator


@operator
def sample_greedy(logits: Tensor, group: Group = Group()) -> Tensor:
    """int64 [T]: the lowest token id among the largest `logits` [T, vocab].

    NaN is never chosen; a row of nothing else, or of nothing but -inf, gives 0. Where the
    vocabulary is split over the ranks of a `group`, `logits` [T, vocab / size] are this rank's
    share; ranks exchange the best of their shares, and all return the same ids.
    """
    logits = logits.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    share = logits.shape[1]
    ids = torch.arange(group.rank * share, (group.rank + 1) * share, device=logits.device)
    largest = logits.amax(-1, keepdim=True)
    first = torch.where(logits == largest, ids, group.size * share).amin(-1)
    values, firsts = group.all_gather(largest.squeeze(-1)), group.all_gather(first)
    return torch.where(values == values.amax(0), firsts, group.size * share).amin(0)


def _needs_side_by_side(logits: Tensor, group: Group = Group()) -> str | None:
    if logits.dtype not in (torch.float32, torch.bfloat16):
        return f"the logits are {logits.dtype}, neither float32 nor bfloat16"
    return None if logits.stride(-1) == 1 else "the logits of a row do not lie side by side"


def _needs_sixteens(logits: Tensor, group: Group = Group()) -> str | None:
    if reason := _needs_side_by_side(logits, group):
        return reason
    share = logits.shape[1]
    return f"a row of {share} logits is no multiple of 16" if share % 16 else None


sample_greedy.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.sample_greedy:sample_greedy",
        packages=("triton",),
        requires=_needs_side_by_side,
    )
)
sample_greedy.add(
    Implementation(
        "aiter",
        "dsv4_plugin.kernels.aiter.sample_greedy:sample_greedy",
        packages=("amd-aiter",),
        archs=("gfx942", "gfx950"),
        requires=_needs_sixteens,
        measured=False,
    )
)
