"""The one table of released tensor names: dtype, shape and how each is split over processes
(docs/model.md §2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import DSpark, Geometry

DTYPE_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "BF16": 2, "F32": 4, "I64": 8}
"""Bytes of an element of each dtype that a release uses, by its safetensors name."""

FP4_GROUP = 32
"""Values along the input dimension that share one scale in an FP4 weight."""


@dataclass(frozen=True)
class Shard:
    """A tensor is cut along `axis` into equal, contiguous shares over the group `group` of
    `parallel.Parallel`.

    A share is a whole multiple of `unit` elements, so that it never cuts a block that shares one
    scale.
    """

    group: str
    axis: int
    unit: int = 1


@dataclass(frozen=True)
class TensorSpec:
    """One released tensor. `dtype` is a safetensors name; `other_dtypes` decode to the same values
    and are accepted too.

    `expert` is the routed expert that the tensor belongs to; it lives only on the processes that
    hold that expert. `scale` and `weight` name the other half of a quantised pair.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard | None = None
    expert: int | None = None
    other_dtypes: tuple[str, ...] = ()
    scale: str | None = None
    weight: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data in a file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def expected_tensors(geometry: Geometry) -> dict[str, TensorSpec]:
    """Every tensor that a release of this geometry holds, by name: no more, no fewer (docs/model.md
    §2)."""
    table = _Table(geometry)
    g, d = geometry, geometry.hidden_size
    table.plain("embed.weight", "BF16", g.vocab_size, d, shard=Shard("vocab", 0))
    table.plain("head.weight", "BF16", g.vocab_size, d, shard=Shard("vocab", 0))
    table.norm("norm", d)
    table.head_collapse("")
    for layer in range(g.num_hidden_layers):
        table.block(f"layers.{layer}.", g.compress_ratios[layer], g.is_hash_routed(layer))
    for block in range(g.num_draft_blocks):
        prefix = f"mtp.{block}."
        table.block(prefix, g.compress_ratios[g.num_hidden_layers + block], hash_routed=False)
        if g.dspark:
            table.dspark(prefix, g.dspark, block)
            continue
        table.fp8(prefix + "e_proj", d, d)
        table.fp8(prefix + "h_proj", d, d)
        for name in ("enorm", "hnorm", "norm"):
            table.norm(prefix + name, d)
        table.head_collapse(prefix)
    return table.specs


class _Table:
    """Collects the specs; one method per part of the model."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.specs: dict[str, TensorSpec] = {}
        # Base releases keep the scales of their 128x128 blocks in fp32; FP8 conversions of the
        # others keep ue8m0.
        self.block_scale = (
            ("F32", ("F8_E8M0",)) if geometry.expert_dtype == "fp8" else ("F8_E8M0", ())
        )

    def plain(self, name: str, dtype: str, *shape: int, shard: Shard | None = None) -> None:
        self.specs[name] = TensorSpec(name, dtype, shape, shard)

    def norm(self, name: str, size: int) -> None:
        self.plain(name + ".weight", "BF16", size)

    def bf16(self, name: str, rows: int, columns: int) -> None:
        self.plain(name + ".weight", "BF16", rows, columns)

    def fp8(
        self,
        name: str,
        rows: int,
        columns: int,
        group: str | None = None,
        axis: int = 0,
        expert: int | None = None,
    ) -> None:
        """An FP8 matrix [rows, columns] and its scales, one per 128x128 block, cut along `axis`
        over `group`."""
        block = self.geometry.weight_block
        grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
        dtype, others = self.block_scale
        self._pair(
            name, "F8_E4M3", (rows, columns), dtype, grid, group, axis, block[axis], expert, others
        )

    def fp4(self, name: str, rows: int, columns: int, group: str, axis: int, expert: int) -> None:
        """An FP4 matrix [rows, columns], two values a byte, and its scales, one per row and 32
        columns."""
        unit = 1 if axis == 0 else FP4_GROUP // 2
        self._pair(
            name,
            "I8",
            (rows, columns // 2),
            "F8_E8M0",
            (rows, columns // FP4_GROUP),
            group,
            axis,
            unit,
            expert,
        )

    def _pair(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, int],
        scale_dtype: str,
        scale_shape: tuple[int, int],
        group: str | None,
        axis: int,
        unit: int,
        expert: int | None,
        others: tuple[str, ...] = (),
    ) -> None:
        weight, scale = name + ".weight", name + ".scale"
        cut = (Shard(group, axis, unit), Shard(group, axis)) if group else (None, None)
        self.specs[weight] = TensorSpec(weight, dtype, shape, cut[0], expert, scale=scale)
        self.specs[scale] = TensorSpec(
            scale, scale_dtype, scale_shape, cut[1], expert, others, weight=weight
        )

    def block(self, prefix: str, ratio: int, hash_routed: bool) -> None:
        d, streams = self.geometry.hidden_size, self.geometry.hc_mult
        self.norm(prefix + "attn_norm", d)
        self.norm(prefix + "ffn_norm", d)
        coefficients = streams * (2 + streams)
        for site in ("attn", "ffn"):
            self.plain(f"{prefix}hc_{site}_fn", "F32", coefficients, streams * d)
            self.plain(f"{prefix}hc_{site}_base", "F32", coefficients)
            self.plain(f"{prefix}hc_{site}_scale", "F32", 3)
        self.attention(prefix + "attn.", ratio)
        self.feed_forward(prefix + "ffn.", hash_routed)

    def head_collapse(self, prefix: str) -> None:
        streams = self.geometry.hc_mult
        self.plain(prefix + "hc_head_fn", "F32", streams, streams * self.geometry.hidden_size)
        self.plain(prefix + "hc_head_base", "F32", streams)
        self.plain(prefix + "hc_head_scale", "F32", 1)

    def dspark(self, prefix: str, draft: DSpark, stage: int) -> None:
        """What the first and the last stage of a DSpark draft hold beside their block."""
        d, vocab = self.geometry.hidden_size, self.geometry.vocab_size
        if stage == 0:
            self.fp8(prefix + "main_proj", d, len(draft.target_layer_ids) * d)
            self.norm(prefix + "main_norm", d)
        if stage == draft.stages - 1:
            self.norm(prefix + "norm", d)
            self.head_collapse(prefix)
            markov = prefix + "markov_head.markov_"
            self.bf16(markov + "w1", vocab, draft.markov_rank)
            # Its rows are added to those of `head`, so they are cut alike.
            self.plain(
                markov + "w2.weight", "BF16", vocab, draft.markov_rank, shard=Shard("vocab", 0)
            )
            self.bf16(prefix + "confidence_head.proj", 1, d + draft.markov_rank)

    def attention(self, prefix: str, ratio: int) -> None:
        g, d = self.geometry, self.geometry.hidden_size
        heads, low_rank = g.num_attention_heads, g.o_groups * g.o_lora_rank
        self.fp8(prefix + "wq_a", g.q_lora_rank, d)
        self.norm(prefix + "q_norm", g.q_lora_rank)
        self.fp8(prefix + "wq_b", heads * g.head_dim, g.q_lora_rank, "attention", 0)
        self.fp8(prefix + "wkv", g.head_dim, d)
        self.norm(prefix + "kv_norm", g.head_dim)
        self.plain(prefix + "attn_sink", "F32", heads, shard=Shard("attention", 0))
        self.fp8(prefix + "wo_a", low_rank, heads * g.head_dim // g.o_groups, "attention", 0)
        self.fp8(prefix + "wo_b", d, low_rank, "attention", 1)
        if ratio:
            self.compressor(prefix + "compressor.", ratio, g.head_dim)
        if ratio == 4:
            self.fp8(prefix + "indexer.wq_b", g.index_n_heads * g.index_head_dim, g.q_lora_rank)
            self.bf16(prefix + "indexer.weights_proj", g.index_n_heads, d)
            self.compressor(prefix + "indexer.compressor.", ratio, g.index_head_dim)

    def compressor(self, prefix: str, ratio: int, head_dim: int) -> None:
        # Ratio 4 overlaps its windows: each token carries one half for the next entry and one for
        # its own.
        width = head_dim * (2 if ratio == 4 else 1)
        self.bf16(prefix + "wkv", width, self.geometry.hidden_size)
        self.bf16(prefix + "wgate", width, self.geometry.hidden_size)
        self.plain(prefix + "ape", "F32", ratio, width)
        self.norm(prefix + "norm", head_dim)

    def feed_forward(self, prefix: str, hash_routed: bool) -> None:
        g, d, inner = self.geometry, self.geometry.hidden_size, self.geometry.moe_intermediate_size
        self.bf16(prefix + "gate", g.n_routed_experts, d)
        if hash_routed:
            self.plain(prefix + "gate.tid2eid", "I64", g.vocab_size, g.num_experts_per_tok)
        else:
            self.plain(prefix + "gate.bias", "F32", g.n_routed_experts)
        routed = self.fp8 if g.expert_dtype == "fp8" else self.fp4
        for expert in range(g.n_routed_experts):
            name = f"{prefix}experts.{expert}."
            routed(name + "w1", inner, d, "expert_tensor", 0, expert)
            routed(name + "w3", inner, d, "expert_tensor", 0, expert)
            routed(name + "w2", d, inner, "expert_tensor", 1, expert)
        self.fp8(prefix + "shared_experts.w1", inner, d, "shared", 0)
        self.fp8(prefix + "shared_experts.w3", inner, d, "shared", 0)
        self.fp8(prefix + "shared_experts.w2", d, inner, "shared", 1)
