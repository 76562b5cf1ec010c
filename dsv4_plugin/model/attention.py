"""Attention of one layer: window, compressor and indexer around the latent caches (docs/model.md
§3.2-3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cache.layout import entry_slots
from ..config import Precision
from ..ops import (
    block_fp8_linear,
    compress,
    grouped_output,
    indexer_logits,
    qk_norm_rope_store,
    rope_hadamard_quant,
    sparse_mla,
    topk_select,
)
from ..ops.block_fp8_linear import linear_fp32
from ..ops.rms_norm_quant import rms_norm
from .build import Build
from .step import Step

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

    def forward(self, x: Tensor, step: Step, ring: Tensor, cache, rotate: bool) -> None:
        """Stores the entries that `x` [T, d] completes."""
        projected = torch.cat(
            (linear_fp32(x, self.wkv.weight), linear_fp32(x, self.wgate.weight)), -1
        )
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
        self.wq_b = build.fp8(self.heads * self.dim, geometry.q_lora_rank)
        self.weights_proj = build.bf16(self.heads, geometry.hidden_size)
        self.compressor = Compressor(build, 4, self.dim)

    def forward(self, x: Tensor, qr: Tensor, step: Step, layer: int) -> Tensor:
        """Entry numbers int64 [T, k] for `x` [T, d] and low-rank queries `qr` [T, q], -1 past the
        last."""
        self.compressor(
            x, step, step.caches.index_ring[layer], step.caches.index[layer], rotate=True
        )
        plan = step.plan
        visible = plan.visible(4)
        entries = plan.max_seq_len // 4
        if entries <= self.topk:
            return topk_select(
                qr.new_zeros(qr.shape[0], entries, dtype=torch.float32), visible, self.topk
            )
        q = self.wq_b(qr).unflatten(-1, (self.heads, self.dim))
        weights = linear_fp32(x, self.weights_proj.weight) * (self.dim**-0.5 * self.heads**-0.5)
        q, weights = rope_hadamard_quant(q, weights, *step.rotations[4].rows, self.rounding)
        return topk_select(
            indexer_logits(q, weights, step.caches.index[layer], plan), visible, self.topk
        )


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

    def _compressed_slots(self, x: Tensor, qr: Tensor, step: Step) -> Tensor | None:
        """Writes this step's entries and returns the slots int64 [T, k] each row attends to, -1
        where none."""
        if not self.ratio:
            return None
        plan, caches = step.plan, step.caches
        self.compressor(
            x, step, caches.ring[self.layer], caches.compressed[self.layer], rotate=False
        )
        if self.ratio == 128:
            return plan.dense_slots
        entries = self.indexer(x, qr, step, self.layer)
        slots = entry_slots(plan.page_table[plan.request], entries.clamp_min(0), 4)
        return slots.masked_fill(entries < 0, -1)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[T, d] of normed `x` [T, d]."""
        cos, sin = step.rotations[self.ratio].rows
        caches, plan = step.caches, step.plan
        qr = rms_norm(self.wq_a(x), self.q_norm.weight, self.eps)
        q = qk_norm_rope_store(
            self.wq_b(qr).unflatten(-1, (self.heads, self.head_dim)),
            self.wkv(x),
            self.kv_norm.weight,
            self.eps,
            cos,
            sin,
            plan.window_write,
            caches.window[self.layer],
        )
        slots = self._compressed_slots(x, qr, step)
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
        z = grouped_output(o, self.wo_a.weight, self.wo_a.scale, self.groups)
        return self.all_reduce(block_fp8_linear(z, self.wo_b.weight, self.wo_b.scale))
