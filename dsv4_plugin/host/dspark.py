"""The DSpark draft in the host: our stages behind the interface of its DSPARK worker.

The loop is the host's own (`DSparkWorkerV2`): it drafts, has the target verify, lets rank 0 decide
what stays, and hands the kept rows to `write_target_hidden_kv` (docs/host.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_device, get_spec
from sglang.srt.speculative.ragged_verify import RaggedVerifyMode, read_ragged_verify_mode
from torch import Tensor, nn

from .. import flags
from ..checkpoint.load import Loader
from ..config import Geometry
from ..model.build import Build
from ..model.dspark import DSpark
from ..ops import build_draft_plan
from ..ops.block_fp8_linear import linear_fp32
from ..ops.rms_norm_quant import rms_norm
from ..ops.step_plan import StepPlan
from ..parallel import Group
from .backend import Backend
from .model import files_to_read, model_directory
from .parallel import host_parallel


class MarkovHead:
    """The low-rank head of the stages, as the host's step over a block asks for it."""

    vocab_shard = None
    """The host gathers nothing: base logits and bias are of the whole vocabulary."""

    def __init__(self, stages: DSpark, vocab: Group):
        self.weights, self.vocab = stages[-1].markov_head, vocab

    def init_state(self, hidden_states: Tensor | None) -> None:
        """The head remembers the token before alone."""

    def get_prev_embeddings(self, tokens: Tensor) -> Tensor:
        """[R, r] of `tokens` int64 [R]."""
        return self.weights.markov_w1.weight[tokens]

    def step_bias(
        self, tokens: Tensor, *, hidden_states: Tensor | None, state: None
    ) -> tuple[Tensor, None]:
        """(fp32 [R, vocab] that `tokens` int64 [R] add to the logits of the next, no state)."""
        bias = linear_fp32(self.get_prev_embeddings(tokens), self.weights.markov_w2.weight)
        return _whole(bias, self.vocab), None

    def step_logits_dtype(self, base: torch.dtype) -> torch.dtype:
        return torch.float32

    def greedy_w2_weight(self) -> None:
        """No fused step for a single row: it would read the weight in place of our product."""


@dataclass
class ConfidenceHead:
    """What the host sets where it schedules verifications by the draft's confidence."""

    sts_temperatures: Tensor | float = 1.0
    """fp32 [block]: what the logit at each place of the block is divided by."""


class DeepseekV4ForCausalLMDSpark(nn.Module):
    """The stages of a checkpoint's DSpark draft; embedding and head are those of the target."""

    sample_from_anchor = True
    uses_own_vocab_modules = False
    recorder = None
    """The target's counts the draft's calls too."""

    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        directory = model_directory(
            get_spec().speculative_draft_model_path, get_spec().speculative_draft_model_revision
        )
        self.allow_patterns_overrides = files_to_read(directory)
        self.geometry, self.precision = Geometry.from_dir(directory), flags.precision()
        self.parallel = host_parallel(self.geometry.num_hidden_layers)
        self.parallel.check(self.geometry)
        device = torch.device(get_device().device)
        self.mtp = DSpark(Build(self.geometry, self.precision, self.parallel, device))
        self.mtp.block_size = get_spec().speculative_num_draft_tokens - 1
        self.gamma = self.mtp.block_size
        self.start_layer, self.end_layer = 0, len(self.mtp)  # of the draft's own pool
        self.cached_layers = range(self.geometry.num_hidden_layers, self.geometry.num_layers)
        self.markov_head = MarkovHead(self.mtp, self.parallel.vocab)
        static = read_ragged_verify_mode() is RaggedVerifyMode.STATIC
        self.confidence_head = None if static else ConfidenceHead()
        self.caches = None  # its backend's, which the pool comes before
        self.embed_tokens: Callable[[Tensor], Tensor] | None = None
        self.lm_head = None

    def backend(self, runner: Any) -> DraftBackend:
        """The attention backend of the runner that holds this draft."""
        return DraftBackend(runner)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the stages' tensors from the host's iterator over the whole checkpoint. Raises
        CheckpointError for what does not fit."""
        loader = Loader(self, self.geometry, self.parallel)
        for name, tensor in weights:
            loader.put(name, tensor)
        loader.finish()

    def attach_shared_modules(
        self, *, embed_tokens: Callable[[Tensor], Tensor], lm_head: Any
    ) -> None:
        """Takes the target's embedding and its `Head`."""
        self.embed_tokens, self.lm_head = embed_tokens, lm_head

    def forward_embed(self, input_ids: Tensor) -> Tensor:
        """[T, d]; the host asks whether there is such a method, and then leaves it to `forward`."""
        return self.embed_tokens(input_ids)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch, **rest: Any
    ) -> LogitsProcessorOutput:
        """Collapsed streams [R·block, d] of the blocks; `positions` are in the plan already."""
        backend = get_attn_backend()
        plan = backend.plan(forward_batch)
        hidden = self.mtp(input_ids, self.forward_embed(input_ids), plan, backend.caches)
        return LogitsProcessorOutput(next_token_logits=None, hidden_states=hidden)

    @torch.no_grad()
    def compute_base_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(fp32 logits [R·block, vocab] before the low-rank head, `hidden` for the confidence)."""
        normed = rms_norm(hidden, self.mtp[-1].norm.weight, self.geometry.rms_norm_eps)
        logits = linear_fp32(normed, self.lm_head.weight)
        return _whole(logits, self.parallel.vocab), hidden

    @torch.no_grad()
    def compute_confidence(
        self, *, anchor_tokens: Tensor, draft_tokens: Tensor, confidence_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(fp32 [R, block]: how likely each of `draft_tokens` is accepted if those before it are,
        their logits). `confidence_features` [R·block, d] are those of `compute_base_logits`."""
        before = torch.cat((anchor_tokens.unsqueeze(1), draft_tokens[:, :-1]), 1).flatten()
        e = self.markov_head.get_prev_embeddings(before)
        logit = self.mtp.confidence_logit(confidence_features, e).view_as(draft_tokens)
        return (logit / self.confidence_head.sts_temperatures).sigmoid(), logit

    def write_target_hidden_kv(
        self, *, main_hidden: Tensor, swa_loc: Tensor, positions: Tensor, pool: Any
    ) -> None:
        """Stores the stages' latents of rows that stay, from the target's taps [T, a·d]."""
        slots = swa_loc.to(torch.int64)
        self.mtp.write_context(main_hidden, positions, slots, self.caches)


def _whole(logits: Tensor, vocab: Group) -> Tensor:
    """[n, vocab] of each process's rows of the vocabulary."""
    return logits if vocab.size == 1 else torch.cat(tuple(vocab.all_gather(logits)), -1)


class DraftBackend(Backend):
    """Step plans and caches of the draft's runner, whose only step is the pass over a block."""

    def __init__(self, runner):
        super().__init__(runner)
        runner.model.caches = self.caches

    def _plan(
        self, batch: ForwardBatch, static: bool = False, out: StepPlan | None = None
    ) -> StepPlan:
        count = batch.seq_lens.shape[0]
        plan = build_draft_plan(
            batch.seq_lens.to(torch.int64),
            batch.positions.shape[0] // max(count, 1),
            self.req_to_token_pool.req_to_token,
            batch.req_pool_indices.to(torch.int64),
            self.token_to_kv_pool.full_to_swa_index_mapping,
        )
        if out is None:
            return replace(plan, static=static)
        for mine, theirs in zip(plan.tensors(), out.tensors(), strict=True):
            theirs.copy_(mine)
        return out
