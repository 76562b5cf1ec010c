"""Scores of the lightning indexer over all compressed entries a token sees (docs/model.md §3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.step_plan import StepPlan
from ..cache.stores import PackedIndexCache, SlotStore
from .operator import Implementation, operator

_MAX_SCORES = 1 << 25  # bounds the reference's largest temporary to 128 MiB


@operator
def indexer_logits(q: Tensor, weights: Tensor, cache: SlotStore, plan: StepPlan) -> Tensor:
    """fp32 logits [T, max_seq_len // 4]: sum over heads of weight · relu(q · k).

    `q` fp32 or e4m3 [T, n, 128], rotated and rounded; `weights` fp32 [T, n], already scaled by
    128^-0.5 · n^-0.5 and, for e4m3, by the scale of each head's query; keys come from `cache` at
    the plan's ratio-4 slots. Logits of entries that a row does not see are -inf here; an
    implementation may leave them undefined.
    """
    q = q.float()
    slots = plan.request_slots(4)
    requests, entries = slots.shape
    logits = q.new_full((q.shape[0], entries), float("-inf"))
    if not logits.numel():
        return logits
    keys = cache.load(slots.flatten()).view(requests, entries, -1)
    block = max(1, _MAX_SCORES // (requests * entries * q.shape[1]))
    for start in range(0, plan.max_queries, block):
        rows = ((plan.query >= start) & (plan.query < start + block)).nonzero().squeeze(-1)
        at = (plan.request[rows], plan.query[rows] - start)
        size = min(block, plan.max_queries - start)
        packed_q = q.new_zeros(requests, size, *q.shape[1:])
        packed_q[at] = q[rows]
        scores = (packed_q.flatten(1, 2) @ keys.transpose(1, 2)).relu_().unflatten(1, (size, -1))
        logits[rows] = torch.einsum("tn,tne->te", weights[rows], scores[at])
    seen = torch.arange(entries, device=q.device) < plan.visible(4).unsqueeze(-1)
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
