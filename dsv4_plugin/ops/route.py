"""Choice of experts and their weights (docs/model.md §3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_fp8_linear import linear_fp32
from .operator import Implementation, operator

FLOOR = 1e-20
"""Added to the sum of the chosen scores, as DeepSeek's own kernels do: weights of scores that all
underflow are 0 and not 0/0."""


def root_of_softplus(x: Tensor) -> Tensor:
    """sqrt(log(1 + e^x)) of fp32 `x`. Below -20 softplus is e^x to the last bit, whose root
    e^(x/2) underflows only below -174."""
    return torch.where(x < -20.0, (x / 2).exp(), F.softplus(x.clamp_min(-20.0)).sqrt())


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
    `token_ids` [T]. Weights are the unbiased scores of the chosen experts over their sum, to which
    1e-20 is added, times `routed_scaling_factor`. A negative token id marks a row that pads a
    captured graph: its experts are -1, which is nobody, and its weights 0.
    """
    scores = root_of_softplus(linear_fp32(x, gate))
    padding = (token_ids < 0).unsqueeze(-1)
    if tid2eid is not None:
        experts = tid2eid[token_ids.clamp_min(0)].to(torch.int64)
    else:
        experts = (scores + bias).sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    chosen = scores.gather(-1, experts)
    weights = chosen / (chosen.sum(-1, keepdim=True) + FLOOR) * routed_scaling_factor
    return weights.masked_fill(padding, 0.0), experts.masked_fill(padding, -1)


def _needs_bf16(x: Tensor, *rest) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, not bfloat16"
    if x.shape[1] % 128:
        return f"hidden size {x.shape[1]} is not a multiple of 128"
    return None


route.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.route:route",
        packages=("triton",),
        requires=_needs_bf16,
    )
)
