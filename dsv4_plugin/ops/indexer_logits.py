"""Scores of the lightning indexer over all compressed entries a token sees (docs/model.md §3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.step_plan import StepPlan
from ..cache.stores import PackedIndexCache, SlotStore
from ..formats import e4m3_to_float
from .operator import HERE, Implementation, operator

_ROWS = 256
"""Rows scored at once: they see nearly the same entries, and their scores fit a cache."""


@operator
def indexer_logits(q: Tensor, weights: Tensor, cache: SlotStore, plan: StepPlan) -> Tensor:
    """fp32 logits [T, max_seq_len // 4]: sum over heads of weight · relu(q · k).

    `q` fp32 or e4m3 [T, n, 128], rotated and rounded; `weights` fp32 [T, n], already scaled by
    128^-0.5 · n^-0.5 and, for e4m3, by the scale of each head's query; keys come from `cache` at
    the plan's ratio-4 slots. Logits of entries that a row does not see are -inf here; an
    implementation may leave them undefined.
    """
    q = e4m3_to_float(q) if q.dtype == torch.float8_e4m3fn else q
    logits = q.new_full((q.shape[0], plan.max_seq_len // 4), float("-inf"))
    if not logits.numel():
        return logits
    slots, visible = plan.request_slots(4), plan.visible(4)
    if HERE.static:
        keys = cache.load(slots.flatten()).view(*slots.shape, -1)
        scores = (q @ keys.index_select(0, plan.request).transpose(1, 2)).relu_()
        seen = torch.arange(logits.shape[1], device=q.device) < visible.unsqueeze(-1)
        return torch.where(seen, (weights.unsqueeze(1) @ scores).squeeze(1), logits)
    first = 0
    for request, rows in enumerate(plan.request.bincount(minlength=slots.shape[0]).tolist()):
        sees = visible[first : first + rows].tolist()
        keys = cache.load(slots[request, : max(sees, default=0)])
        for start in range(0, rows, _ROWS):
            part = slice(first + start, first + min(start + _ROWS, rows))
            most = sees[part.stop - first - 1]
            scores = (q[part].flatten(0, 1) @ keys[:most].t()).relu_()
            scores = scores.view(part.stop - part.start, q.shape[1], most)
            logits[part, :most] = (weights[part].unsqueeze(1) @ scores).squeeze(1)
        first += rows
    seen = torch.arange(logits.shape[1], device=q.device) < visible.unsqueeze(-1)
    return logits.masked_fill_(~seen, float("-inf"))


def _needs_packed_fp8(q: Tensor, weights: Tensor, cache: SlotStore, plan: StepPlan) -> str | None:
    if not isinstance(cache, PackedIndexCache):
        return f"the index cache is a {type(cache).__name__}, not packed"
    return None if q.dtype == torch.float8_e4m3fn else f"q is {q.dtype}, not float8_e4m3fn"


indexer_logits.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.indexer_logits:indexer_logits",
        packages=("triton",),
        fp8=True,
        requires=_needs_packed_fp8,
    )
)
indexer_logits.add(
    Implementation(
        "tilelang",
        "dsv4_plugin.kernels.tilelang.indexer_logits:indexer_logits",
        packages=("tilelang==0.1.12",),
        archs=("gfx950", "gfx942", "sm_90"),
        requires=_needs_packed_fp8,
        measured=False,
    )
)
