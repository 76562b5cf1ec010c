"""Attention backend "dsv4": turns the host's batch into the step plan that the model reads.

The model does its own attention over the caches, so this backend has no kernels. It owns the caches
of its worker's pool and, once per step and before the forward, snapshots everything that is read
from tables the scheduler shares with us: while a step runs, the scheduler frees windows, rewrites
rows and reassigns pages.
"""

from __future__ import annotations

import logging

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from .. import flags
from ..config import Precision
from ..ops import build_step_plan
from ..ops.operator import enter_step
from ..ops.step_plan import StepPlan
from .ledger import verify
from .pool import pool_caches, ring_rows

logger = logging.getLogger(__name__)

_PADDED_LENGTH = 1
"""Sequence length of a row that pads a batch: it owns request row 0, whose slots are all 0 and
belong to nobody."""


class Backend(AttentionBackend):
    """Step plans and caches of one model runner of the host."""

    def __init__(self, runner):
        model = runner.model.model
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        ratios = model.geometry.compress_ratios[: model.geometry.num_hidden_layers]
        self.caches = pool_caches(self.token_to_kv_pool, ratios, model.precision)
        self.rings = ring_rows(self.token_to_kv_pool, ratios)
        self.forward_metadata: StepPlan | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Builds the plan of this step; the forward reads nothing else of the batch's tables."""
        self.forward_metadata = self._plan(forward_batch)

    def plan(self, forward_batch: ForwardBatch) -> StepPlan:
        """The plan of the step in progress; an idle step, for which the host prepares nothing, gets
        an empty one."""
        if forward_batch.forward_mode.is_idle():
            return self._plan(forward_batch)
        return self.forward_metadata

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        return _PADDED_LENGTH

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return _PADDED_LENGTH

    def _plan(self, batch: ForwardBatch) -> StepPlan:
        seq_lens = batch.seq_lens.to(torch.int64)
        requests = torch.arange(seq_lens.shape[0], device=seq_lens.device)
        if batch.forward_mode.is_extend():
            prefix = batch.extend_prefix_lens.to(torch.int64)
            request = requests.repeat_interleave(
                batch.extend_seq_lens.to(torch.int64), output_size=batch.positions.shape[0]
            )
            max_queries = max(batch.extend_seq_lens_cpu, default=0)
        else:
            prefix, request, max_queries = seq_lens - 1, requests, min(seq_lens.shape[0], 1)
        enter_step(max_queries)
        return build_step_plan(
            batch.positions.to(torch.int64),
            request,
            batch.out_cache_loc.to(torch.int64),
            prefix_lens=prefix,
            seq_lens=seq_lens,
            slot_table=self.req_to_token_pool.req_to_token,
            slot_row=batch.req_pool_indices.to(torch.int64),
            full_to_window=self.token_to_kv_pool.full_to_swa_index_mapping,
            max_queries=max_queries,
            max_seq_len=max(batch.seq_lens_cpu.tolist(), default=0),
            rings=self.rings,
        )


def create_backend(runner) -> Backend:
    """Factory in the host's registry of attention backends."""
    verify("while the attention backend is built")
    backend = Backend(runner)
    precision = flags.precision()
    if precision is not Precision.SERVING:
        logger.warning(
            "dsv4_plugin: DSV4_PRECISION=%s keeps fp32 caches beside the pool; it is for checking, "
            "not for production",
            precision.value,
        )
    return backend
