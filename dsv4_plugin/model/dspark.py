"""DSpark, the block-parallel draft of the releases since June 2026 (docs/model.md §3.8).

Its stages are blocks of ratio 0. The backbone's streams after a few layers, taken together, make
the latents of the tokens before the block (`write_context`); the block itself, the anchor and as
many noise tokens, goes through all stages at once (`forward`), and a head of low rank adds what
each drafted token says of the next (`propose`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..cache import Caches
from ..ops.block_fp8_linear import linear_fp32
from ..ops.operator import enter_step
from ..ops.qk_norm_rope_store import store_latents
from ..ops.rms_norm_quant import rms_norm
from ..ops.rope import inverse_frequencies, rotation
from ..ops.step_plan import StepPlan
from .build import Build
from .replicas import rows_of_all
from .step import Step, rotations
from .transformer import Block, HeadCollapse


class MarkovHead(nn.Module):
    """What a token says of the one after it: `markov_w1[token] markov_w2ᵀ` is added to the
    logits."""

    def __init__(self, build: Build, rank: int):
        super().__init__()
        vocab = build.geometry.vocab_size
        self.markov_w1 = build.rows(vocab, rank)
        self.markov_w2 = build.rows(vocab // build.parallel.vocab.size, rank)


class ConfidenceHead(nn.Module):
    """How likely a drafted token is accepted, if those before it are."""

    def __init__(self, build: Build, rank: int):
        super().__init__()
        self.proj = build.rows(1, build.geometry.hidden_size + rank)


class DSparkStage(Block, HeadCollapse):
    """One stage: a block, with the projection of the taps on the first and the heads on the
    last."""

    def __init__(self, build: Build, stage: int):
        geometry, draft = build.geometry, build.geometry.dspark
        super().__init__(build, geometry.num_hidden_layers + stage)
        d = geometry.hidden_size
        if stage == 0:
            self.main_proj = build.fp8(d, len(draft.target_layer_ids) * d)
            self.main_norm = build.norm(d)
        if stage == draft.stages - 1:
            self._add_head_collapse(build)
            self.markov_head = MarkovHead(build, draft.markov_rank)
            self.confidence_head = ConfidenceHead(build, draft.markov_rank)


class Proposal(NamedTuple):
    """What is drafted for R requests."""

    tokens: Tensor
    """int64 [R, block]."""
    logits: Tensor
    """fp32 [R, block, vocab] that each token was picked from."""
    confidence: Tensor
    """fp32 [R, block]: probability that a token is accepted, if those before it are."""


class DSpark(nn.ModuleList):
    """The stages `mtp.0`, `mtp.1`, … of a draft, on one process of a parallel layout."""

    def __init__(self, build: Build):
        geometry = build.geometry
        super().__init__(DSparkStage(build, stage) for stage in range(geometry.dspark.stages))
        self.block_size = geometry.dspark.block_size
        self.noise_token_id = geometry.dspark.noise_token_id
        self.eps, self.streams = geometry.rms_norm_eps, geometry.hc_mult
        self._parallel = build.parallel
        self.register_buffer(
            "frequencies", inverse_frequencies(geometry, 0).to(build.device), persistent=False
        )

    def write_context(self, taps: Tensor, position: Tensor, slots: Tensor, caches: Caches) -> None:
        """Stores each stage's latents of tokens that the backbone has seen.

        `taps` [T, a·d] as `DeepseekV4.forward` gives them, `position` and window slots `slots`
        int64 [T]; a row whose slot is negative is not stored. All stages read the same projection,
        and neither a stage's norm nor its hyper-connection is applied to it.
        """
        first = self[0]
        x = rms_norm(first.main_proj(taps), first.main_norm.weight, self.eps)
        cos, sin = rotation(position, self.frequencies)
        for stage in self:
            attn = stage.attn
            store_latents(
                attn.wkv(x),
                attn.kv_norm.weight,
                self.eps,
                cos,
                sin,
                slots,
                caches.window[stage.layer],
            )

    def block(self, anchors: Tensor) -> Tensor:
        """Token ids int64 [R·block] that go in: each request's anchor of `anchors` [R], then
        noise."""
        ids = anchors.new_full((anchors.shape[0], self.block_size), self.noise_token_id)
        ids[:, 0] = anchors
        return ids.flatten()

    def forward(self, ids: Tensor, embedded: Tensor, plan: StepPlan, caches: Caches) -> Tensor:
        """Collapsed streams [R·block, d] of the block `ids`, before the norm of the head.

        `plan` is that of `ops.build_draft_plan`: every row of a request sees the same keys, up to
        128 of context and the whole block.
        """
        enter_step(plan.max_queries, plan.static)
        step = Step(
            ids,
            plan,
            caches,
            rotations(plan, {0: self.frequencies}),
            rows=rows_of_all(self._parallel, ids.shape[0]),
        )
        streams = embedded.unsqueeze(1).expand(-1, self.streams, -1)
        for stage in self:
            streams = stage(streams, step)
        return self[-1].collapsed(streams)

    def propose(
        self,
        hidden: Tensor,
        anchors: Tensor,
        head: Callable[[Tensor], Tensor],
        pick: Callable[[Tensor], Tensor],
    ) -> Proposal:
        """Tokens of a block, one after the other, from its `hidden` [R·block, d].

        `head` gives fp32 logits [n, vocab] of normed hidden states, `pick` int64 [R] of logits [R,
        vocab]. Row j predicts the token after position p + j, p that of the anchor.
        """
        last = self[-1]
        base = head(rms_norm(hidden, last.norm.weight, self.eps))
        base = base.unflatten(0, (-1, self.block_size))
        hidden = hidden.unflatten(0, (-1, self.block_size))
        token, rows = anchors, []
        for j in range(self.block_size):
            e = last.markov_head.markov_w1.weight[token]
            logits = base[:, j] + linear_fp32(e, last.markov_head.markov_w2.weight)
            token = pick(logits)
            rows.append((token, logits, self.confidence(hidden[:, j], e)))
        return Proposal(*(torch.stack(part, 1) for part in zip(*rows)))

    def confidence(self, hidden: Tensor, e: Tensor) -> Tensor:
        """fp32 [R] of `hidden` [R, d], collapsed but not normed, and of what `markov_w1` holds for
        the token before, `e` [R, r]."""
        return self.confidence_logit(hidden, e).sigmoid()

    def confidence_logit(self, hidden: Tensor, e: Tensor) -> Tensor:
        """The same before the sigmoid."""
        features = torch.cat((hidden, e), -1)
        return linear_fp32(features, self[-1].confidence_head.proj.weight).squeeze(-1)
