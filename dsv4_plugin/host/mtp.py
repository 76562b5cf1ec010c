"""The MTP block of the releases of April in the host: the draft of its EAGLE worker.

The loop is the host's own (`EAGLEWorkerV2`): the target verifies a chain of drafted tokens, the
block reads what stayed (draft extend), which gives the first token of the next chain, and further
tokens come from its own streams, one step each (docs/model.md §3.7, docs/host.md).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_device, get_spec
from torch import Tensor, nn

from .. import flags
from ..cache import Caches
from ..checkpoint.load import Loader
from ..config import Geometry, Precision
from ..model import DeepseekV4
from ..ops.step_plan import StepPlan
from .backend import Backend
from .model import Head, files_to_read, model_directory
from .parallel import host_parallel


class DraftHead(Head):
    """What the host's LogitsProcessor takes for the LM head of the MTP block."""

    def apply(self, layer: object, streams: Tensor, bias: Tensor | None = None) -> Tensor:
        """fp32 logits [n, vocab of this process] of the block's streams [n, 4·d]."""
        block = self.model.mtp[0]
        return self.model.logits(
            block.collapse(streams.unflatten(-1, (self.model.geometry.hc_mult, -1)))
        )


class DeepseekV4ForCausalLMNextN(nn.Module):
    """The MTP block of a checkpoint; embedding and head are those of the target."""

    recorder = None
    """The target's counts the draft's calls too."""

    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        directory = model_directory(
            get_spec().speculative_draft_model_path, get_spec().speculative_draft_model_revision
        )
        self.allow_patterns_overrides = files_to_read(directory)
        geometry = Geometry.from_dir(directory)
        parallel = host_parallel(geometry.num_hidden_layers)
        self.model = DeepseekV4(
            geometry, flags.precision(), parallel, get_device().device, parts="mtp"
        )
        self.cached_layers = range(geometry.num_hidden_layers, geometry.num_hidden_layers + 1)
        self.start_layer, self.end_layer = 0, 1  # of the draft's own pool
        self.head = DraftHead(self.model)
        self.logits_processor = LogitsProcessor(config)

    @property
    def geometry(self) -> Geometry:
        return self.model.geometry

    @property
    def precision(self) -> Precision:
        return self.model.precision

    def backend(self, runner: Any) -> Backend:
        """The attention backend of the runner that holds this draft."""
        return Backend(runner)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes the block's tensors from the host's iterator over the whole checkpoint. Raises
        CheckpointError for what does not fit."""
        loader = Loader(self.model, self.geometry, self.model.parallel)
        for name, tensor in weights:
            loader.put(name, tensor)
        loader.finish()

    def set_embed_and_head(self, embed: Tensor, head: Tensor) -> None:
        """Takes the target's, which it loads anew with the target's weights."""
        self.model.embed.weight.data, self.model.head.weight.data = embed.data, head.data

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch, **rest: Any
    ) -> LogitsProcessorOutput:
        """Logits and streams of the rows the batch asks for. `input_ids` [T] are the tokens after
        each row; its streams, the target's or the block's own, come with the batch."""
        backend = get_attn_backend()
        plan = backend.plan(forward_batch)
        before = forward_batch.spec_info.hidden_states.unflatten(-1, (self.geometry.hc_mult, -1))
        streams = self.model.draft(input_ids, before.to(self.model.dtype), plan, backend.caches)
        streams = streams.flatten(1)
        return self.logits_processor(input_ids, streams, self.head, forward_batch, None, streams)


class ChainStep(AttentionBackend):
    """Plans one further token of every chain."""

    def __init__(self, backend: Backend, step: int, steps: int):
        self.backend, self.step, self.steps = backend, step, steps
        self.forward_metadata: StepPlan | None = None

    @property
    def caches(self) -> Caches:
        return self.backend.caches

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """`forward_batch` has the slots of all steps, request by request, and the lengths and
        positions before the first."""
        batch = copy.copy(forward_batch)
        batch.out_cache_loc = batch.out_cache_loc.view(-1, self.steps)[:, self.step]
        batch.positions = batch.positions + self.step
        batch.seq_lens = batch.seq_lens + self.step + 1
        self.backend.init_forward_metadata(batch)
        self.forward_metadata = self.backend.forward_metadata

    def plan(self, forward_batch: ForwardBatch) -> StepPlan:
        return self.forward_metadata


class Chain(AttentionBackend):
    """The steps of a chain of `steps` drafted tokens after its first, planned before any is taken:
    the scheduler may then change its tables."""

    def __init__(self, backend: Backend, steps: int):
        self.attn_backends = [ChainStep(backend, step, steps) for step in range(steps)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for step in self.attn_backends[:-1]:  # the last token is not read before it is verified
            step.init_forward_metadata(forward_batch)
