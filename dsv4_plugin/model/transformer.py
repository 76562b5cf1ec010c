"""The model: embedding, blocks around four residual streams, head collapse, and the MTP block
(docs/model.md §3).

Parameter paths are the released tensor names, routed experts aside, which are stacked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Caches
from ..config import Geometry, Precision
from ..ops import linear_fp32, mhc_head, mhc_post, mhc_post_pre, mhc_pre
from ..ops.operator import HERE, enter_step
from ..ops.rms_norm_quant import rms_norm
from ..ops.rope import inverse_frequencies
from ..ops.step_plan import StepPlan
from ..parallel import Parallel
from .attention import Attention
from .build import Build
from .feed_forward import FeedForward
from .linear import Activation
from .replicas import rows_of_all
from .step import Step, rotations


class Mixing(NamedTuple):
    """A sub-layer's output `y` [T, d] that the `streams` [T, n, d] before it do not hold yet, with
    `post` [T, n] and `comb` [T, n, n] to mix it in."""

    y: Tensor
    streams: Tensor
    post: Tensor
    comb: Tensor


class Block(nn.Module):
    """One layer: attention and experts, each inside a hyper-connection."""

    def __init__(self, build: Build, layer: int):
        super().__init__()
        geometry = build.geometry
        n, d = geometry.hc_mult, geometry.hidden_size
        self.layer, self.ratio = layer, geometry.compress_ratios[layer]
        self.packed = build.packed
        self.iterations, self.hc_eps, self.eps = (
            geometry.hc_sinkhorn_iters,
            geometry.hc_eps,
            geometry.rms_norm_eps,
        )
        self.attn_norm, self.attn = build.norm(d), Attention(build, layer)
        self.ffn_norm, self.ffn = build.norm(d), FeedForward(build, layer)
        for site in ("attn", "ffn"):
            self.register_parameter(f"hc_{site}_fn", build.fp32(2 * n + n * n, n * d))
            self.register_parameter(f"hc_{site}_base", build.fp32(2 * n + n * n))
            self.register_parameter(f"hc_{site}_scale", build.fp32(3))

    def forward(self, streams: Tensor, step: Step) -> Tensor:
        """Streams [T, 4, d] after the layer."""
        return mhc_post(*self.advance(streams, step))

    def advance(self, state: Tensor | Mixing, step: Step) -> Mixing:
        """What is left to mix after the layer, for the streams before it or what the layer before
        it left."""
        HERE.layer, HERE.ratio = self.layer, self.ratio
        for norm, layer, fn, base, scale in (
            (self.attn_norm, self.attn, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale),
            (self.ffn_norm, self.ffn, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale),
        ):
            site = (fn, base, scale, norm.weight, self.iterations, self.hc_eps, self.eps)
            if isinstance(state, Mixing):
                streams, *entry = mhc_post_pre(*state, *site, self.packed)
            else:
                streams, entry = state, mhc_pre(state, *site, self.packed)
            x, codes, x_scale, post, comb = entry
            del state, entry  # mixed in; at 8192 rows of Pro the streams are half a gigabyte
            state = Mixing(layer(Activation(x, codes, x_scale), step), streams, post, comb)
        return state


class HeadCollapse:
    """Turns four streams into the normed input of the head; the model and each MTP block own such
    parameters."""

    def _add_head_collapse(self, build: Build) -> None:
        n, d = build.geometry.hc_mult, build.geometry.hidden_size
        self.norm = build.norm(d)
        self.hc_head_fn, self.hc_head_base = build.fp32(n, n * d), build.fp32(n)
        self.hc_head_scale = build.fp32(1)
        self.hc_eps, self.eps = build.geometry.hc_eps, build.geometry.rms_norm_eps

    def collapsed(self, streams: Tensor) -> Tensor:
        """One stream [T, d] of `streams` [T, 4, d], in their dtype."""
        return self._head(streams, None)

    def collapse(self, streams: Tensor) -> Tensor:
        """Input of the head [T, d] of `streams` [T, 4, d], in their dtype."""
        return self._head(streams, self.norm.weight)

    def _head(self, streams: Tensor, weight: Tensor | None) -> Tensor:
        HERE.layer = HERE.ratio = -1
        return mhc_head(
            streams,
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            weight,
            self.hc_eps,
            self.eps,
        )


class MTPBlock(Block, HeadCollapse):
    """Predicts one token further from the backbone's streams and the next token's embedding
    (docs/model.md §3.7)."""

    def __init__(self, build: Build, layer: int):
        super().__init__(build, layer)
        d = build.geometry.hidden_size
        self.e_proj, self.h_proj = build.fp8(d, d), build.fp8(d, d)
        self.enorm, self.hnorm = build.norm(d), build.norm(d)
        self._add_head_collapse(build)

    def forward(self, embedded: Tensor, streams: Tensor, step: Step) -> Tensor:
        """Streams [T, 4, d] of the next tokens' `embedded` [T, d] and the backbone's `streams` [T,
        4, d]."""
        e = self.e_proj(rms_norm(embedded, self.enorm.weight, self.eps))
        h = self.h_proj(rms_norm(streams, self.hnorm.weight, self.eps).flatten(0, 1)).view_as(
            streams
        )
        return super().forward(e.unsqueeze(1) + h, step)


class DeepseekV4(nn.Module, HeadCollapse):
    """DeepSeek-V4 on one process of a parallel layout.

    `parts` is "backbone", "mtp" (the MTP blocks or the DSpark draft, with embedding and head) or
    "all". With attention replicas all processes take every step together, those of a replica
    without rows as well. Raises ParallelError when the layout does not fit the geometry.
    """

    def __init__(
        self,
        geometry: Geometry,
        precision: Precision = Precision.SERVING,
        parallel: Parallel = Parallel(),
        device: torch.device | str = "cpu",
        parts: str = "all",
    ):
        super().__init__()
        parallel.check(geometry)
        build = Build(geometry, Precision(precision), parallel, torch.device(device))
        self.geometry, self.precision, self.parallel = geometry, build.precision, parallel
        self.dtype, self.parts = build.dtype, parts
        vocab = geometry.vocab_size // parallel.vocab.size
        stage, last = parallel.stage(geometry), parallel.is_last(geometry)
        if stage.start == 0:
            self.embed = build.rows(vocab, geometry.hidden_size)
        if last:
            self.head = build.rows(vocab, geometry.hidden_size)
        self.layers = nn.ModuleList()
        for layer in stage if parts != "mtp" else ():
            self.layers.add_module(str(layer), Block(build, layer))  # its number in the checkpoint
        if last and parts != "mtp":
            self._add_head_collapse(build)
        self.mtp = _draft(build) if parts != "backbone" else nn.ModuleList()
        for ratio in sorted(set(geometry.compress_ratios)):
            self.register_buffer(
                f"frequencies_{ratio}", inverse_frequencies(geometry, ratio).to(build.device), False
            )

    def _step(self, token_ids: Tensor, plan: StepPlan, caches: Caches) -> Step:
        enter_step(plan.max_queries, plan.static)
        ratios = sorted(set(self.geometry.compress_ratios) & {0, *plan.compression})
        frequencies = {ratio: getattr(self, f"frequencies_{ratio}") for ratio in ratios}
        # What pads a batch writes to slot 0, which belongs to nobody.
        routed = token_ids.masked_fill(plan.window_write <= 0, -1)
        rows = rows_of_all(self.parallel, token_ids.shape[0])
        return Step(routed, plan, caches, rotations(plan, frequencies), plan.visible(4), rows)

    def embedded(self, token_ids: Tensor) -> Tensor:
        """Embeddings [T, d] of `token_ids` int64 [T]."""
        group = self.parallel.vocab
        if group.size == 1:
            return F.embedding(token_ids, self.embed.weight).to(self.dtype)
        local = token_ids - group.rank * self.embed.weight.shape[0]
        mine = (local >= 0) & (local < self.embed.weight.shape[0])
        rows = F.embedding(local.masked_fill(~mine, 0), self.embed.weight).to(self.dtype)
        return group.all_reduce(rows.masked_fill(~mine.unsqueeze(-1), 0))

    def forward(
        self,
        token_ids: Tensor,
        plan: StepPlan,
        caches: Caches,
        taps: list[Tensor] | None = None,
        streams: Tensor | None = None,
    ) -> Tensor:
        """Residual streams [T, 4, d] after the backbone for `token_ids` int64 [T]; the caches take
        the step's entries. With `taps`, the mean [T, d] of the streams after each layer that a
        DSpark draft reads is appended to it. A later stage of a pipeline takes the `streams` of the
        one before it."""
        step = self._step(token_ids, plan, caches)
        if streams is None:
            streams = self.embedded(token_ids).unsqueeze(1).expand(-1, self.geometry.hc_mult, -1)
        tapped = self.geometry.dspark.target_layer_ids if taps is not None else ()
        states: list[Tensor | Mixing] = [streams]
        for layer in self.layers:
            # Handed over: a layer frees the streams before it as soon as it has mixed them.
            states.append(layer.advance(states.pop(), step))
            if layer.layer in tapped:
                states.append(mhc_post(*states.pop()))
                taps.append(states[0].mean(1))
        HERE.layer = HERE.ratio = -1
        (state,) = states
        return mhc_post(*state) if isinstance(state, Mixing) else state

    def draft(
        self,
        next_token_ids: Tensor,
        streams: Tensor,
        plan: StepPlan,
        caches: Caches,
        block: int = 0,
    ) -> Tensor:
        """Streams [T, 4, d] of MTP `block` from the backbone's `streams` at t and the token ids at
        t + 1."""
        step = self._step(next_token_ids, plan, caches)
        return self.mtp[block](self.embedded(next_token_ids), streams, step)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [T, vocab] of collapsed `hidden` [T, d]; this process's rows of the vocabulary
        only."""
        return linear_fp32(hidden, self.head.weight)

    def whole_logits(self, hidden: Tensor) -> Tensor:
        """fp32 [T, vocab] of collapsed `hidden` [T, d]: the rows of all processes of the
        vocabulary's group."""
        logits = self.logits(hidden)
        if self.parallel.vocab.size == 1:
            return logits
        return self.parallel.vocab.all_gather(logits).movedim(0, 1).flatten(1)


def _draft(build: Build) -> nn.ModuleList:
    """The blocks named `mtp.*`: stages of DSpark, or MTP blocks."""
    geometry = build.geometry
    if geometry.dspark:
        from .dspark import DSpark  # made of the blocks of this module

        return DSpark(build)
    layers = range(geometry.num_hidden_layers, geometry.num_layers)
    return nn.ModuleList(MTPBlock(build, layer) for layer in layers)
