"""Greedy choice in aiter's argmax kernel."""

from __future__ import annotations

import torch
from aiter.ops.sample import greedy_sample
from torch import Tensor

from ...parallel import Group


def sample_greedy(logits: Tensor, group: Group = Group()) -> Tensor:
    """The operator of the same name for rows whose logits lie side by side, a multiple of 16 of
    them: aiter reads 16 at a time, and zeros past a row's end."""
    ids = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    if logits.shape[0]:
        greedy_sample(ids, logits)
    ids = ids.long()
    if group.size == 1:
        return ids
    # a row without any number gave 0, whatever lies there
    largest = logits.gather(1, ids.unsqueeze(1)).squeeze(1)
    values = group.all_gather(largest.nan_to_num(float("-inf"), float("inf"), float("-inf")))
    firsts = group.all_gather(ids + group.rank * logits.shape[1])
    return firsts.masked_fill(values < values.amax(0), group.size * logits.shape[1]).amin(0)
