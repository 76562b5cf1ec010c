"""The host's DSPARK worker on a CPU, with the few of its steps that launch a kernel."""

from __future__ import annotations

from typing import Any

import torch
from sglang.kernels.ops.speculative.dspark.dspark_accept import AcceptSampling
from sglang.srt.speculative.dspark_components.dspark_worker_v2 import DSparkWorkerV2
from torch import Tensor

from ..ops.accept import accept_sampled, probabilities
from .draft_slots import SLOT_SEAMS
from .ledger import attribute_seam, take_once


class _Lengths(Tensor):
    """A CPU tensor that takes the host's note of the stream that it is read on."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def record_stream(self, stream: Any) -> None:
        """On a CPU a tensor is read before it can be freed."""


class DSparkWorker(DSparkWorkerV2):
    """The host's worker, on tensors of a CPU."""

    def __init__(self, *arguments: Any, **named: Any):
        take_once((*SLOT_SEAMS, *ACCEPT_SEAMS))
        super().__init__(*arguments, **named)
        self._decode_graph_allowed = False  # or it makes buffers for graphs

    def _forward_decode(self, batch: Any, *arguments: Any, **named: Any) -> Any:
        batch.seq_lens = batch.seq_lens.as_subclass(_Lengths)
        return super()._forward_decode(batch, *arguments, **named)


def accept(
    *,
    candidates: Tensor,
    target_logits: Tensor,
    draft_probs: Tensor,
    sampling_info: Any,
    cutoff_verify_lens: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(drafted tokens that stay, the token after them, tokens that a cap took) int64 [R] each, for
    requests that are sampled.

    `candidates` int64 [R, n + 1] are each request's anchor and its draft, drawn from `draft_probs`
    fp32 [R, n, vocab]; `target_logits` [R·(n + 1), vocab]. With `cutoff_verify_lens` int64 [R] at
    most so many rows of a request were verified, and what is accepted past them is taken back.
    """
    drafted = candidates[:, 1:]
    rows = target_logits.unflatten(0, candidates.shape)
    vocab = rows.shape[-1]
    target = torch.stack(
        [
            probabilities(logits, temperature, top_k if top_k < vocab else 0, top_p)
            for logits, temperature, top_k, top_p in zip(
                rows,
                sampling_info.temperatures.flatten().tolist(),
                sampling_info.top_ks.tolist(),
                sampling_info.top_ps.tolist(),
            )
        ]
    )
    count, bonus = accept_sampled(drafted, draft_probs, target)
    if cutoff_verify_lens is None:
        return count, bonus, torch.zeros_like(count)
    capped = count.minimum(cutoff_verify_lens - 1)
    # A token that was accepted follows the target's law, so it may stand where the cap cuts.
    cut = drafted.gather(1, capped.clamp_max(drafted.shape[1] - 1).unsqueeze(1)).squeeze(1)
    return capped, torch.where(capped < count, cut, bonus), count - capped


ACCEPT_SEAMS = (
    attribute_seam(
        AcceptSampling,
        "torch",
        accept,
        why="the host accepts sampled drafts with a Triton kernel, also where it calls it torch",
        remove="the host's AcceptSampling.torch runs on a CPU",
        test="tests/host/test_dspark.py",
    ),
)
"""Taken where the worker is built."""
