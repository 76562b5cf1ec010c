"""Attention backend "dsv4": turns the host's batch into the step plan that the model reads.

The model does its own attention over the caches, so this backend has no kernels. It owns the caches
of its worker's pool and, once per step and before the forward, snapshots everything that is read
from tables the scheduler shares with us: while a step runs, the scheduler frees windows, rewrites
rows and reassigns pages.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_disagg, get_memory
from torch import Tensor

from .. import flags
from ..cache.step_plan import context_bucket
from ..config import Precision
from ..ops import build_step_plan
from ..ops.operator import Calls, enter_step
from ..ops.step_plan import StepPlan
from .ledger import take_once, verify
from .metrics import Recorder
from .platform import CpuPlatform
from .pool import pool_caches, ring_rows

logger = logging.getLogger(__name__)

_PADDED_LENGTH = 1
"""Sequence length of a row that pads a batch: it owns request row 0, whose slots are all 0 and
belong to nobody."""


@dataclass
class Captured:
    """One captured size: the host's batch over its static inputs, the plan that the graph reads,
    and the operator calls that each replay repeats."""

    batch: ForwardBatch
    plan: StepPlan
    calls: Calls = field(default_factory=Calls)


class Backend(AttentionBackend):
    """Step plans and caches of one model runner of the host."""

    def __init__(self, runner):
        served = runner.model
        self.recorder: Recorder | None = served.recorder
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.context_len = runner.model_config.context_len
        layers = served.cached_layers
        ratios = served.geometry.compress_ratios[layers.start : layers.stop]
        self.caches = pool_caches(self.token_to_kv_pool, ratios, served.precision, layers.start)
        self.caches.wait = self.token_to_kv_pool.wait_layer_transfer
        self.rings = ring_rows(self.token_to_kv_pool, ratios)
        self.forward_metadata: StepPlan | None = None
        self._captured: dict[tuple, Captured] = {}
        self.capturing: Captured | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Builds the plan of this step; the forward reads nothing else of the batch's tables."""
        self.capturing = None
        self.forward_metadata = self._plan(forward_batch)

    def plan(self, forward_batch: ForwardBatch) -> StepPlan:
        """The plan of the step in progress; an idle step, for which the host prepares nothing, gets
        an empty one."""
        if forward_batch.forward_mode.is_idle():
            return self._plan(forward_batch)
        return self.forward_metadata

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """Once the plan is built, which is before the forward or the replay: it is a snapshot. So
        the scheduler waits for the plan alone before it writes its tables anew."""
        if fm.is_decode() or fm.is_extend():
            return SharedReadEnds.PRE_REPLAY
        return super().shared_read_ends(fm)

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        return _PADDED_LENGTH

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return _PADDED_LENGTH

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing to make: each captured size has a plan of its own, made when it is captured."""

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Before a capture, makes the plan whose tensors the graph will read, from the runner's
        static inputs; before a replay, puts the step's values into it."""
        key = forward_batch.forward_mode, forward_batch.batch_size
        if in_capture:
            plan = self._plan(forward_batch, static=True)
            self.capturing = self._captured[key] = Captured(forward_batch, plan)
        else:
            captured = self._captured[key]
            self._plan(captured.batch, out=captured.plan)
            captured.calls.add()
            if self.recorder is not None:
                self.recorder.step(captured.plan.phase)
        self.forward_metadata = self._captured[key].plan

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Nothing is left to do: a plan inside the graph would hold the scheduler's tables until
        the replay ends, where the platform has no event within a graph (ROCm)."""

    def _plan(
        self, batch: ForwardBatch, static: bool = False, out: StepPlan | None = None
    ) -> StepPlan:
        """The plan of `batch`: `static`, as a graph needs it, for the longest context there is; or
        `out`, such a plan, refreshed."""
        static = static or out is not None
        seq_lens = batch.seq_lens.to(torch.int64)
        requests = torch.arange(seq_lens.shape[0], device=seq_lens.device)
        rows = batch.positions.shape[0]
        verifies = batch.forward_mode.is_target_verify()
        if verifies:  # the host counts the rows to verify in no length
            prefix, counts = seq_lens, _verified(batch)
            max_queries = batch.spec_info.draft_token_num
            seq_lens = prefix + counts
        elif batch.forward_mode.is_draft_extend_v2():  # and counts them where a draft reads them
            max_queries = batch.spec_info.num_tokens_per_req
            prefix, counts = seq_lens - max_queries, torch.full_like(seq_lens, max_queries)
        elif batch.forward_mode.is_extend():
            rows = sum(batch.extend_seq_lens_cpu)  # others pad a step of all attention replicas
            prefix, counts = (
                lens.to(torch.int64) for lens in (batch.extend_prefix_lens, batch.extend_seq_lens)
            )
            max_queries = max(batch.extend_seq_lens_cpu, default=0)
        else:
            prefix, counts, max_queries = seq_lens - 1, None, min(seq_lens.shape[0], 1)
        request = (
            requests if counts is None else requests.repeat_interleave(counts, output_size=rows)
        )
        on_cpu = seq_lens.device.type == "cpu"
        if static or (not on_cpu and (verifies or max_queries <= 1)):
            longest = self.context_len  # a kernel ends by each row's length; one shape for all
        else:
            lens = seq_lens if on_cpu else batch.seq_lens_cpu
            longest = max(lens.tolist(), default=0)
            if max_queries <= 1:
                longest = context_bucket(longest, self.context_len)
        enter_step(max_queries, static)
        return build_step_plan(
            batch.positions[:rows].to(torch.int64),
            request,
            batch.out_cache_loc[:rows].to(torch.int64),
            prefix_lens=prefix,
            seq_lens=seq_lens,
            slot_table=self.req_to_token_pool.req_to_token,
            slot_row=batch.req_pool_indices.to(torch.int64),
            full_to_window=self.token_to_kv_pool.full_to_swa_index_mapping,
            max_queries=max_queries,
            max_seq_len=longest,
            rings=self.rings,
            static_rows=static,
            may_shrink=verifies,
            out=out,
        )


def _verified(batch: ForwardBatch) -> Tensor:
    """int64 [R]: rows of each request that a step verifies."""
    layout = batch.spec_info.ragged_verify_layout
    if layout is not None:
        return layout.verify_lens.to(torch.int64)
    return torch.full_like(batch.seq_lens, batch.spec_info.draft_token_num, dtype=torch.int64)


def _take_cpu_seams() -> None:
    """Those of features that this server was started with: their modules take seconds to load."""
    if get_memory().enable_hierarchical_cache:
        from .host_memory import CPU_MEMORY_SEAMS

        take_once(CPU_MEMORY_SEAMS)
    if get_disagg().disaggregation_mode != "null":
        from .transfer import cpu_seams

        take_once(cpu_seams(get_disagg().disaggregation_transfer_backend))


def create_backend(runner) -> Backend:
    """Factory in the host's registry of attention backends."""
    if isinstance(current_platform, CpuPlatform):
        _take_cpu_seams()
    verify("while the attention backend is built")
    if runner.is_draft_worker:
        return runner.model.backend(runner)
    backend = Backend(runner)
    precision = flags.precision()
    if precision is not Precision.SERVING:
        logger.warning(
            "dsv4_plugin: DSV4_PRECISION=%s keeps fp32 caches beside the pool; it is for checking, "
            "not for production",
            precision.value,
        )
    return backend
