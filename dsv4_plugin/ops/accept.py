"""Which drafted tokens stay, and the token after them (docs/model.md §3.9)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sample_greedy import sample_greedy


class Accepted(NamedTuple):
    """What one verification says of R requests with n drafted tokens each."""

    count: Tensor
    """int64 [R]: drafted tokens that stay, 0 to n; they are the first ones."""
    bonus: Tensor
    """int64 [R]: the token after them, which the target itself gives."""


def accept_greedy(drafted: Tensor, logits: Tensor) -> Accepted:
    """`drafted` int64 [R, n] against the target's `logits` fp32 [R, n + 1, vocab].

    Row j of the logits judges drafted token j; the tokens that stay are the longest prefix that
    greedy decoding would have given, so the output is that of greedy decoding.
    """
    best = sample_greedy(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
    count = (drafted == best[:, :-1]).to(torch.int64).cumprod(1).sum(1)
    return Accepted(count, best.gather(1, count.unsqueeze(1)).squeeze(1))


def accept_sampled(
    drafted: Tensor, drawn_from: Tensor, target: Tensor, generator: torch.Generator | None = None
) -> Accepted:
    """Drafts that were drawn stay or go so that every token follows the target's law.

    `drafted` int64 [R, n] were drawn from the probabilities `drawn_from` fp32 [R, n, vocab], Q;
    `target` fp32 [R, n + 1, vocab] are the target's, P. Token j stays with probability
    min(1, P_j/Q_j); the one after the last that stays is drawn from max(P - Q, 0), or from P after
    all n (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1). Rows of ones and zeros in P and Q
    make it greedy.
    """
    n, device = drafted.shape[1], drafted.device
    at = drafted.unsqueeze(-1)
    p, q = target[:, :n].gather(-1, at).squeeze(-1), drawn_from.gather(-1, at).squeeze(-1)
    u = torch.rand(drafted.shape, generator=generator, device=device)
    count = (u * q < p).to(torch.int64).cumprod(1).sum(1)
    row = torch.arange(drafted.shape[0], device=device)
    last = target[row, count]
    refused = (count < n).unsqueeze(-1)
    rest = (last - drawn_from[row, count.clamp_max(n - 1)]).clamp_min_(0).where(refused, last)
    # P = Q but for rounding leaves nothing; then either law will do.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, last)
    return Accepted(count, torch.multinomial(rest, 1, generator=generator).squeeze(-1))


def probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """fp32 probabilities of `logits` [..., vocab] at `temperature`; 0 puts all on the largest.

    With `top_k` > 0 only that many of the largest are left, with `top_p` < 1 then only the fewest
    whose sum reaches it; what is left adds up to 1.
    """
    logits = logits.float()
    if temperature <= 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    p = (logits / temperature).softmax(-1)
    if top_k <= 0 and top_p >= 1:
        return p
    ordered, index = p.sort(stable=True, dim=-1, descending=True)
    if 0 < top_k < p.shape[-1]:
        ordered[..., top_k:] = 0
        ordered /= ordered.sum(-1, keepdim=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    ordered /= ordered.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter_(-1, index, ordered)
