"""Indexer scores in DeepGEMM's kernel, as SGLang ships it for NVIDIA; it reads the same pages."""

from __future__ import annotations

import torch
from deep_gemm import fp8_paged_mqa_logits, get_num_sms, get_paged_mqa_logits_metadata
from torch import Tensor

from ...cache.layout import INDEX_DIM, INDEX_PAGE_ENTRIES
from ...cache.step_plan import StepPlan
from ...cache.stores import PackedIndexCache


def indexer_logits(q: Tensor, weights: Tensor, cache: PackedIndexCache, plan: StepPlan) -> Tensor:
    """The operator of the same name for e4m3 queries of 32 or 64 heads and a packed cache; every
    row is a request of its own, with a page table of its own."""
    rows, entries = q.shape[0], plan.max_seq_len // 4
    if not rows or not entries:
        return torch.empty(rows, entries, dtype=torch.float32, device=q.device)
    seen = plan.visible(4).to(torch.int32).unsqueeze(1)
    return fp8_paged_mqa_logits(
        q.unsqueeze(1),
        cache.pages.view(-1, INDEX_PAGE_ENTRIES, 1, INDEX_DIM + 4),
        weights,
        seen,
        plan.page_table.to(torch.int32)[plan.request],
        get_paged_mqa_logits_metadata(seen, INDEX_PAGE_ENTRIES, get_num_sms()),
        entries,
        clean_logits=False,
    )
