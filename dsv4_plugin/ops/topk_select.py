"""Exact selection of the compressed entries a token attends to (docs/model.md §3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.layout import entry_slots
from ..cache.step_plan import StepPlan
from .operator import Implementation, operator


@operator(varying=(1,))
def topk_select(logits: Tensor, visible: Tensor, topk: int, plan: StepPlan | None = None) -> Tensor:
    """Entry numbers int64 [T, min(topk, E)] of the largest `logits` fp32 [T, E], ascending, -1 past
    the last; with `plan` the ratio-4 slots of those entries.

    Only the first `visible` [T] entries of a row count; a row that sees no more than `topk` selects
    all of them. Equal logits at the border go to the lowest entry numbers.
    """
    numbers = _numbers(logits, visible, topk)
    if plan is None:
        return numbers
    slots = entry_slots(plan.page_table[plan.request], numbers.clamp_min(0), 4)
    return slots.masked_fill(numbers < 0, -1)


def _numbers(logits: Tensor, visible: Tensor, topk: int) -> Tensor:
    entries = logits.shape[1]
    number = torch.arange(entries, device=logits.device)
    seen = number < visible.unsqueeze(-1)
    if entries <= topk:
        return torch.where(seen, number, -1)
    logits = logits.masked_fill(~seen, float("-inf"))
    border = logits.topk(topk, -1, sorted=False).values.amin(-1, keepdim=True)
    above = logits > border
    tied = (logits == border) & seen
    rank = tied.cumsum(-1, dtype=torch.int32)
    chosen = above | (tied & (rank <= topk - above.sum(-1, keepdim=True)))
    # each chosen number goes to its place, all others to one more column
    place = (chosen.cumsum(-1, dtype=torch.int32) - 1).masked_fill_(~chosen, topk)
    numbers = number.new_full((logits.shape[0], topk + 1), -1)
    numbers.scatter_(1, place.to(torch.int64), number.expand_as(logits))
    return numbers[:, :topk].contiguous()


topk_select.add(
    Implementation(
        "triton", "dsv4_plugin.kernels.triton.topk_select:topk_select", packages=("triton",)
    )
)
