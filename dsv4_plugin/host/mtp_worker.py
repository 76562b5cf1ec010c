"""The host's EAGLE worker on a CPU, with the steps of it that launch a kernel.

Drafts are chains (`--speculative-eagle-topk 1`), so the host's trees have one branch each.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache import deepseek_v4_memory_pool
from sglang.srt.speculative import eagle_utils, eagle_worker_common
from sglang.srt.speculative.draft_utils import DraftBackendFactory
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
from torch import Tensor

from .draft_slots import SLOT_SEAMS, cache_locs
from .ledger import attribute_seam, take_once
from .mtp import Chain


class MTPWorker(EAGLEWorkerV2):
    """The host's worker, on tensors of a CPU."""

    def __init__(self, *arguments: Any, **named: Any):
        take_once((*SLOT_SEAMS, *CHAIN_SEAMS))
        super().__init__(*arguments, **named)


def chain_backend(factory: DraftBackendFactory) -> tuple[str, Chain]:
    """(name, backend) of the steps after a chain's first token."""
    runner = factory.draft_model_runner
    return "dsv4", Chain(runner.attn_backend, factory.speculative_num_steps)


def extend_backend(factory: DraftBackendFactory) -> tuple[str, Any]:
    """(name, backend) of the step in which the draft reads what stayed: that of its prefill, whose
    caches it shares."""
    return "dsv4", factory.draft_model_runner.attn_backend


def draft_cache_locs(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
) -> None:
    """Puts the slots of the `num_cols` positions after each request's end into `out_cache_loc`."""
    out_cache_loc.copy_(
        cache_locs(req_pool_indices, req_to_token, seq_lens, None, 0, num_cols, None)
    )


def build_chain(
    parent_list: Tensor,
    selected_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    tree_mask_mode: Any,
) -> None:
    """The rows of each request one after the other, none with a sibling; our attention reads no
    mask of a tree."""
    column = torch.arange(num_verify_tokens)
    positions.copy_((seq_lens.unsqueeze(1) + column).flatten())
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token.copy_(torch.cat((column[1:], column.new_tensor([-1]))))
    retrieve_next_sibling.fill_(-1)


def verify_chain(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The drafted tokens that greedy decoding would have given stay.

    `candidates` [R, n + 1] are each request's anchor and its draft, `target_predict` [R, n + 1] the
    target's choice after each. `predicts` [R·(n + 1)] takes what follows each row, `accept_index`
    [R, n + 1] the rows that stay, then -1, and `accept_token_num` [R] how many drafts those are.
    """
    count = (candidates[:, 1:] == target_predict[:, :-1]).to(torch.int64).cumprod(1).sum(1)
    predicts.copy_(target_predict.flatten())
    _keep(count, accept_index, accept_token_num)
    return predicts, accept_index, accept_token_num


def _keep(count: Tensor, accept_index: Tensor, accept_token_num: Tensor) -> None:
    rows = torch.arange(accept_index.numel()).view_as(accept_index)
    column = torch.arange(accept_index.shape[1])
    accept_index.copy_(rows.where(column <= count.unsqueeze(1), -1))
    accept_token_num.copy_(count)


def sample_chain(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    **rest: Any,
) -> None:
    """The same for requests that are sampled from `target_probs` fp32 [R, n + 1, vocab].

    The draft is one token and no law: it stays with the probability that the target gives it, and
    else the token is drawn from the target's law without it (Leviathan et al. 2023, arXiv
    2211.17192, with a draft of probability one). `uniform_samples` [R, n + 1] and
    `uniform_samples_for_final_sampling` [R] are the host's draws from 0 to 1.
    """
    n, row = candidates.shape[1] - 1, torch.arange(candidates.shape[0])
    drafted = candidates[:, 1:].to(torch.int64)
    p = target_probs[:, :n].gather(-1, drafted.unsqueeze(-1)).squeeze(-1)
    count = (uniform_samples[:, :n] < p).to(torch.int64).cumprod(1).sum(1)
    law = target_probs[row, count].clone()
    refused = (count < n).nonzero().squeeze(-1)
    law[refused, drafted[refused, count[refused]]] = 0
    reached = law.cumsum(-1)
    drawn = uniform_samples_for_final_sampling.unsqueeze(1) * reached[:, -1:]
    follows = torch.cat((drafted, drafted[:, :1]), 1)
    follows[row, count] = (reached > drawn).to(torch.int64).argmax(-1)
    predicts.copy_(follows.flatten())
    _keep(count, accept_index, accept_token_num)


def top_k_renorm(probs: Tensor, top_ks: Tensor) -> Tensor:
    """`probs` [n, vocab] with all but each row's `top_ks` [n] largest at 0, and 1 as their sum."""
    ordered, index = probs.sort(stable=True, dim=-1, descending=True)
    ordered[torch.arange(probs.shape[-1]) >= top_ks.unsqueeze(1)] = 0
    ordered /= ordered.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, index, ordered)


def top_p_renorm(probs: Tensor, top_ps: Tensor) -> Tensor:
    """`probs` [n, vocab] with all but the fewest of the largest whose sum reaches `top_ps` [n] at
    0, and 1 as their sum."""
    ordered, index = probs.sort(stable=True, dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_ps.unsqueeze(1)] = 0
    ordered /= ordered.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, index, ordered)


def fill_bonus_tokens(
    accept_tokens: Tensor,
    accept_lens: Tensor,
    bonus_tokens: Tensor,
    accept_stride: int,
    batch_size: int,
) -> None:
    """The last token that each request's step gave, of `accept_tokens` [R, n + 1]."""
    rows = accept_tokens.view(batch_size, accept_stride)
    bonus_tokens.copy_(rows.gather(1, accept_lens.to(torch.int64).unsqueeze(1) - 1).squeeze(1))


def keep_rejected_projections(*arguments: Any, **named: Any) -> None:
    """The host wipes what the compressors' rings hold of rejected rows; our plans give a row of a
    ring by its position, and rejected ones are written anew before any is read."""


def _seam(owner: Any, name: str, value: Any, why: str) -> Any:
    return attribute_seam(
        owner,
        name,
        value,
        why=why,
        remove="the host has a function without Triton for it, outside of sgl_kernel",
        test="tests/host/test_mtp.py",
    )


_KERNEL = "the host has a kernel for GPUs alone"
_CLASSES = "the host builds its own backends for drafts, past the registry"

CHAIN_SEAMS = (
    _seam(DraftBackendFactory, "_create_dsv4_decode_backend", chain_backend, _CLASSES),
    _seam(DraftBackendFactory, "_create_dsv4_prefill_backend", extend_backend, _CLASSES),
    _seam(
        eagle_worker_common, "assign_draft_cache_locs_contiguous_func", draft_cache_locs, _KERNEL
    ),
    _seam(eagle_worker_common, "fill_bonus_tokens_func", fill_bonus_tokens, _KERNEL),
    _seam(eagle_utils, "build_tree_kernel_efficient_func", build_chain, _KERNEL),
    _seam(eagle_utils, "verify_tree_greedy_func", verify_chain, _KERNEL),
    _seam(eagle_utils, "tree_speculative_sampling_target_only", sample_chain, _KERNEL),
    _seam(eagle_utils, "top_k_renorm_prob", top_k_renorm, _KERNEL),
    _seam(eagle_utils, "top_p_renorm_prob", top_p_renorm, _KERNEL),
    _seam(
        deepseek_v4_memory_pool,
        "clear_unaccepted_c128_draft_states",
        keep_rejected_projections,
        _KERNEL,
    ),
)
"""Taken where the worker is built."""
