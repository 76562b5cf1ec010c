"""Choice of experts and their weights (docs/model.md §3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_fp8_linear import linear_fp32
from .operator import operator


@operator
def route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    tid2eid: Tensor | None,
    token_ids: Tensor,
    topk: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """(weights fp32 [T, topk], experts int64 [T, topk]) of tokens `x` [T, d].

    Scores are sqrt(softplus(x · gateᵀ)) in fp32, `gate` [E, d]. Learned layers take the top-k of
    score + `bias` [E], ties to the lowest expert; hash layers take `tid2eid` [vocab, topk] of
    `token_ids` [T]. Weights are the unbiased scores of the chosen experts, normalised and times
    `routed_scaling_factor`; if all of them underflow to 0, each expert gets an equal share.
    """
    scores = F.softplus(linear_fp32(x, gate)).sqrt()
    if tid2eid is not None:
        experts = tid2eid[token_ids].to(torch.int64)
    else:
        experts = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    chosen = scores.gather(-1, experts)
    total = chosen.sum(-1, keepdim=True)
    weights = torch.where(total > 0, chosen / total, 1.0 / topk)
    return weights * routed_scaling_factor, experts
