"""Greedy batches of the host's sampler go through the operator `sample_greedy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler
from torch import Tensor

from ..ops import sample_greedy
from .ledger import Seam

host_forward = Sampler.forward
"""What the host had when ours was put in its place, hooks of other plugins included."""


def _take(value: Callable[..., Tensor]) -> None:
    global host_forward
    host_forward = Sampler.forward
    Sampler.forward = value


def forward(
    sampler: Sampler,
    logits_output: Any,
    sampling_info: Any,
    return_logprob: bool,
    top_logprobs_nums: list[int],
    token_ids_logprobs: list[list[int]],
    positions: Tensor,
    *,
    logprob_logits: Tensor | None = None,
) -> Tensor:
    """The host's `Sampler.forward`; where all requests of a batch are greedy, its steps with the
    operator in place of `torch.argmax`, which is what the operator's reference is.

    Batches that want more than tokens and log-probabilities of the same logits are the host's.
    """
    logits = logits_output.next_token_logits
    if (
        not sampling_info.is_all_greedy
        or not logits.shape[0]
        or logprob_logits is not None
        or sampling_info.sampling_mask_batch_indices is not None
    ):
        return host_forward(
            sampler,
            logits_output,
            sampling_info,
            return_logprob,
            top_logprobs_nums,
            token_ids_logprobs,
            positions,
            logprob_logits=logprob_logits,
        )
    logits = sampler._preprocess_logits(logits, sampling_info)
    tokens = sample_greedy(logits)
    if return_logprob:
        sampler.output_logprob_processor.compute_logprobs(
            torch.log_softmax(logits, -1), top_logprobs_nums, token_ids_logprobs, tokens
        ).write_output_to(logits_output)
    sampler._sync_token_ids_across_tp(tokens, sampling_info)
    return tokens


SAMPLER = Seam(
    target="sglang.srt.layers.sampler.Sampler.forward",
    why="greedy batches are sampled by the operator that DSV4_SAMPLE_GREEDY chooses",
    remove="the host's sampler calls a function for its greedy choice that can be registered",
    test="tests/host/test_sampler.py",
    value=forward,
    take=_take,
    found=lambda: [Sampler.forward],
)
"""Taken where our model is built; in the process of any other model the sampler stays the
host's."""
