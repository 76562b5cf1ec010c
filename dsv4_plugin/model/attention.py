"""Attention of one layer: window, compressor and indexer around the latent caches (docs/model.md
§3.2-3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import Precision
from ..ops import (
    compress,
    grouped_output,
    indexer_logits,
    qk_norm_rope_store,
    rms_norm_quant,
    rope_hadamard_quant,
    sparse_mla,
    topk_select,
)
from .agreement import Agreement
from .build import Build
from .linear import Activation, Joint, Linear
from .step import Step

_MOST_LOGITS = 1 << 28
"""Indexer scores held at once, 1 GiB: a prefill at a million tokens is scored in blocks of rows."""
_INDEX_ROUNDING = {Precision.EXACT: "none", Precision.OFFICIAL: "fp4", Precision.SERVING: "fp8"}


class Compressor(nn.Module):
    """Projections and norm of compressed entries of `head_dim` channels."""

    def __init__(self, build: Build, ratio: int, head_dim: int):
        super().__init__()
        self.ratio, self.eps, self.dtype = ratio, build.geometry.rms_norm_eps, build.dtype
        width = head_dim * (2 if ratio == 4 else 1)
        self.wkv = build.bf16(width, build.geometry.hidden_size)
        self.wgate = build.bf16(width, build.geometry.hidden_size)
        self.ape = build.fp32(ratio, width)
        self.norm = build.norm(head_dim)

    @property
    def matrices(self) -> tuple[Linear, Linear]:
        """What a token is projected with."""
        return self.wkv, self.wgate

    def forward(self, projected: Tensor, step: Step, ring: Tensor, cache, rotate: bool) -> None:
        """Stores the entries that the tokens of `projected` fp32 [T, 2·width] complete."""
        cos, sin = step.rotations[self.ratio].entries
        compress(
            projected,
            ring,
            step.plan.compression[self.ratio],
            self.ape,
            self.norm.weight,
            self.eps,
            cos,
            sin,
            cache,
            self.dtype,
            rotate,
        )


class Indexer(nn.Module):
    """Chooses the ratio-4 entries each token attends to."""

    def __init__(self, build: Build):
        super().__init__()
        geometry = build.geometry
        self.heads, self.dim, self.topk = (
            geometry.index_n_heads,
            geometry.index_head_dim,
            geometry.index_topk,
        )
        self.rounding = _INDEX_ROUNDING[build.precision]
        self._agree = Agreement("entries", build.parallel.attention)
        self.wq_b = build.fp8(self.heads * self.dim, geometry.q_lora_rank)
        self.weights_proj = build.bf16(self.heads, geometry.hidden_size)
        self.compressor = Compressor(build, 4, self.dim)

    def forward(self, q: Tensor, weights: Tensor, step: Step, layer: int) -> Tensor:
        """Slots int64 [T, k] of the chosen entries for queries `q` [T, n·128] and head weights
        `weights` fp32 [T, n], as projected; -1 past the last."""
        q = q.unflatten(-1, (self.heads, self.dim))
        q, weights = rope_hadamard_quant(q, weights, *step.rotations[4].rows, self.rounding)
        slots = self._chosen(q, weights, step, layer)
        # Where every visible entry is chosen, there is nothing to agree on.
        return slots if step.plan.max_seq_len // 4 <= self.topk else self._agree(slots)[0]

    def _chosen(self, q: Tensor, weights: Tensor, step: Step, layer: int) -> Tensor:
        plan, cache = step.plan, step.caches.index[layer]
        tokens, entries = q.shape[0], plan.max_seq_len // 4
        block = max(1, _MOST_LOGITS // max(entries, 1))
        if tokens <= block:
            logits = indexer_logits(q, weights, cache, plan)
            return topk_select(logits, step.visible, self.topk, plan)
        chosen = []
        for start in range(0, tokens, block):
            rows = slice(start, start + block)
            part = plan.rows(rows)
            chosen.append(
                topk_select(
                    # without a name, so that one block of them lives at a time
                    indexer_logits(q[rows], weights[rows], cache, part),
                    step.visible[rows],
                    self.topk,
                    part,
                )
            )
        return torch.cat(chosen)


class Attention(nn.Module):
    """One layer's attention on this process's heads; the output is a partial sum over the attention
    group."""

    def __init__(self, build: Build, layer: int):
        super().__init__()
        geometry, group = build.geometry, build.parallel.attention
        self.layer, self.ratio = layer, geometry.compress_ratios[layer]
        self.head_dim, self.eps, self.softmax_scale = (
            geometry.head_dim,
            geometry.rms_norm_eps,
            geometry.softmax_scale,
        )
        self.heads, self.groups = (
            geometry.num_attention_heads // group.size,
            geometry.o_groups // group.size,
        )
        self.all_reduce = group.all_reduce
        group_inputs = geometry.num_attention_heads // geometry.o_groups * geometry.head_dim
        self.wq_a = build.fp8(geometry.q_lora_rank, geometry.hidden_size)
        self.q_norm = build.norm(geometry.q_lora_rank)
        self.wq_b = build.fp8(self.heads * self.head_dim, geometry.q_lora_rank)
        self.wkv = build.fp8(self.head_dim, geometry.hidden_size)
        self.kv_norm = build.norm(self.head_dim)
        self.attn_sink = build.fp32(self.heads)
        self.wo_a = build.fp8(self.groups * geometry.o_lora_rank, group_inputs)
        self.wo_b = build.fp8(geometry.hidden_size, self.groups * geometry.o_lora_rank)
        if self.ratio:
            self.compressor = Compressor(build, self.ratio, self.head_dim)
        if self.ratio == 4:
            self.indexer = Indexer(build)
        self._join(build)

    def _join(self, build: Build) -> None:
        """Puts the matrices that share an input side by side in memory."""
        self._low_rank = Joint(self.wq_a, self.wkv)
        queries, projections, widths = [self.wq_b], [], []
        if self.ratio:
            projections += self.compressor.matrices
            widths.append(2 * self.compressor.ape.shape[1])
        if self.ratio == 4:
            queries.append(self.indexer.wq_b)
            projections += [*self.indexer.compressor.matrices, self.indexer.weights_proj]
            widths += [2 * self.indexer.compressor.ape.shape[1], self.indexer.heads]
        self._queries = Joint(*queries)
        self._projections = Joint(*projections, parts=tuple(widths)) if projections else None
        self._keep = "fp8" if build.packed else "normed"

    def _compressed_slots(
        self, projected: tuple[Tensor, ...], q: list, step: Step
    ) -> Tensor | None:
        """Writes this step's entries and returns the slots int64 [T, k] each row attends to, -1
        where none. `projected` and `q` are what the joint products gave for compressor and
        indexer."""
        if not self.ratio:
            return None
        plan, caches, layer = step.plan, step.caches, self.layer
        self.compressor(projected[0], step, caches.ring[layer], caches.compressed[layer], False)
        if self.ratio == 128:
            return plan.dense_slots
        self.indexer.compressor(
            projected[1], step, caches.index_ring[layer], caches.index[layer], True
        )
        return self.indexer(*q, projected[2], step, layer)

    def forward(self, x: Activation, step: Step) -> Tensor:
        """[T, d] of normed `x` [T, d]."""
        cos, sin = step.rotations[self.ratio].rows
        caches, plan = step.caches, step.plan
        caches.wait(self.layer)
        low, kv = self._low_rank(x)
        q, *index_q = self._queries(
            Activation(*rms_norm_quant(low, self.q_norm.weight, self.eps, self._keep))
        )
        q = qk_norm_rope_store(
            q.unflatten(-1, (self.heads, self.head_dim)),
            kv,
            self.kv_norm.weight,
            self.eps,
            cos,
            sin,
            plan.window_write,
            caches.window[self.layer],
        )
        projected = self._projections.fp32(x.values) if self.ratio else ()
        slots = self._compressed_slots(projected, index_q, step)
        o = sparse_mla(
            q,
            caches.window[self.layer],
            plan.window,
            caches.compressed.get(self.layer),
            slots,
            self.attn_sink,
            self.softmax_scale,
            cos,
            sin,
        )
        quantize = self.wo_b.scale is not None
        z = grouped_output(o, self.wo_a.weight, self.wo_a.scale, self.groups, quantize)
        return self.all_reduce(self.wo_b(Activation(None, *z) if quantize else z))
