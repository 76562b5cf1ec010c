"""Lower bound of one step of a model on a node of GPUs, by component, from geometry alone
(docs/model.md §5).

A component takes at least the longer of its memory time and its matrix time; components follow one
another, because the layers of a model do. Every byte is counted once a step (no cache is credited
across kernels, no re-read is charged), every rank is equally loaded, and nothing but the work below
is charged: sampling, scheduling and gaps between steps are free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..config import Geometry
from .hardware import Hardware
from .layout import Layout, LayoutError
from .memory import INDEX_BYTES, SLOT_BYTES
from .weights import component_bytes

LAUNCHES = {
    # rms_norm_quant, wq_a and wkv, norm of q, wq_b, qk_norm_rope_store, sparse_mla and its combine
    "attention": 7,
    "output": 2,  # grouped_output, wo_b
    "compressor": 2,  # its GEMM, compress
    # its compressor's two, wq_b, weights_proj, rope_hadamard_quant, indexer_logits, topk_select
    "indexer": 7,
    "mhc": 2,  # post_pre at both boundaries of a block
    "moe": 7,  # rms_norm_quant, gate, route, two expert stages, two of the shared expert
}
"""Dependent kernels of one block when each operator of this package is as few as it can be."""

KINDS = ("weights", "caches", "activations", "collectives", "launches")


@dataclass(frozen=True)
class Efficiency:
    """Fraction of each peak that is reached, 1 = the limit itself; `launch` overrides the GPU's
    seconds per kernel."""

    bandwidth: float = 1.0
    compute: float = 1.0
    link: float = 1.0
    weights: float = 1.0
    caches: float = 1.0
    activations: float = 1.0
    prefill: float = 1.0
    launch: float | None = None


@dataclass(frozen=True)
class Component:
    """Work of one component on one GPU in one step."""

    name: str
    kind: str
    bytes: float = 0.0
    flops: Mapping[str, float] = field(default_factory=dict)
    """FLOP by operand dtype."""
    link_bytes: float = 0.0
    launches: int = 0

    def memory_seconds(self, hardware: Hardware) -> float:
        return self.bytes / hardware.bandwidth

    def compute_seconds(self, hardware: Hardware) -> float:
        return sum(flops / hardware.flops[dtype] for dtype, flops in self.flops.items())

    def seconds(self, hardware: Hardware, efficiency: Efficiency = Efficiency()) -> float:
        own = getattr(efficiency, self.kind, 1.0)
        memory = self.memory_seconds(hardware) / (efficiency.bandwidth * own)
        compute = self.compute_seconds(hardware) / (efficiency.compute * own)
        launch = hardware.launch if efficiency.launch is None else efficiency.launch
        return (
            max(memory, compute)
            + self.link_bytes / (hardware.scale_up * efficiency.link)
            + self.launches * launch
        )


@dataclass(frozen=True)
class Step:
    """One step: `tokens` new tokens in all, of which `sampled` need logits, over histories
    described by `context`."""

    geometry: Geometry
    hardware: Hardware
    layout: Layout
    tokens: float
    context: int
    prefill: bool
    components: tuple[Component, ...]
    efficiency: Efficiency = Efficiency()

    @property
    def seconds(self) -> float:
        return sum(
            component.seconds(self.hardware, self.efficiency) for component in self.components
        )

    @property
    def memory_seconds(self) -> float:
        """Time to move the step's bytes at full bandwidth: the table "HBM lower bound" of
        docs/model.md §5."""
        return sum(component.memory_seconds(self.hardware) for component in self.components)

    def by_kind(self) -> dict[str, float]:
        """Kind of work -> seconds; they add up to `seconds`."""
        sums = dict.fromkeys(KINDS, 0.0)
        for component in self.components:
            sums[component.kind] += component.seconds(self.hardware, self.efficiency)
        return sums

    def under(self, efficiency: Efficiency) -> Step:
        return replace(self, efficiency=efficiency)


def decode_step(
    geometry: Geometry,
    hardware: Hardware,
    layout: Layout,
    batch: int,
    context: int,
    index_dtype: str = "fp8",
    rows: int = 1,
) -> Step:
    """`rows` new tokens, more than one to verify drafts, for each of `batch` requests that hold
    `context` tokens. Raises LayoutError for a layout that does not fit.

    Rows of one request see nearly the same, so what they read of the caches is charged once.
    """
    visible = {4: min(geometry.index_topk, context // 4), 128: context // 128, 0: 0}
    return _step(
        geometry,
        hardware,
        layout,
        batch * rows,
        context,
        False,
        visible,
        context / 4,
        batch * rows,
        batch,
        index_dtype,
    )


def step_of(
    geometry: Geometry,
    hardware: Hardware,
    layout: Layout,
    tokens: int,
    context: int,
    sampled: int,
    requests: int,
) -> Step:
    """A step of layers of ratio 0 alone: `tokens` of `requests` requests see `context` latents
    each, `sampled` rows need logits."""
    visible = dict.fromkeys((0, 4, 128), 0)
    return _step(
        geometry,
        hardware,
        layout,
        tokens,
        context,
        False,
        visible,
        0,
        sampled,
        requests,
        "fp8",
    )


def prefill_step(
    geometry: Geometry,
    hardware: Hardware,
    layout: Layout,
    requests: int,
    length: int,
    index_dtype: str = "fp8",
) -> Step:
    """`requests` prompts of `length` tokens from empty caches; per token it sees the average over
    positions."""
    topk = geometry.index_topk
    selected = length / 8 if length / 4 <= topk else topk * (1 - 2 * topk / length)
    visible = {4: selected, 128: length / 256, 0: 0}
    return _step(
        geometry,
        hardware,
        layout,
        requests * length,
        length,
        True,
        visible,
        length / 8,
        requests,
        requests,
        index_dtype,
    )


def _step(
    geometry: Geometry,
    hardware: Hardware,
    layout: Layout,
    tokens: float,
    context: int,
    prefill: bool,
    visible: Mapping[int, float],
    scanned: float,
    sampled: int,
    requests: int,
    index_dtype: str,
) -> Step:
    layout.check(geometry)
    if layout.ep not in (1, layout.gpus):
        raise LayoutError(
            f"layout {layout.name}: ep is {layout.ep}; a step's time is known for experts that are"
            f" split by index over all {layout.gpus} GPUs or not at all"
        )
    if tokens < 1 or context < 1:
        raise LayoutError(
            f"a step needs at least one token and one token of context, not {tokens:g} and"
            f" {context}"
        )
    if index_dtype not in INDEX_BYTES:
        raise LayoutError(
            f"index_dtype is {index_dtype!r}; the indexer's keys are {' or '.join(INDEX_BYTES)}"
        )
    work = _Work(
        geometry,
        layout,
        tokens,
        context,
        visible,
        scanned,
        sampled,
        requests,
        INDEX_BYTES[index_dtype],
    )
    return Step(
        geometry,
        hardware,
        layout,
        tokens,
        context,
        prefill,
        (
            *work.weights(),
            *work.caches(prefill),
            work.streams(),
            *work.collectives(),
            work.launches(),
        ),
    )


class _Work:
    """Bytes and FLOP of one step on one GPU. Suffix `local`: of the tokens of one attention
    group."""

    def __init__(
        self,
        geometry: Geometry,
        layout: Layout,
        tokens: float,
        context: int,
        visible: Mapping[int, float],
        scanned: float,
        sampled: int,
        requests: int,
        index_bytes: int,
    ):
        self.geometry, self.layout, self.tokens, self.context = geometry, layout, tokens, context
        self.visible, self.scanned, self.sampled, self.index_bytes = (
            visible,
            scanned,
            sampled,
            index_bytes,
        )
        self.local = max(tokens / layout.dp, 1.0)
        self.requests_local = max(requests / layout.dp, 1.0)
        self.ratios = geometry.compress_ratios[: geometry.num_hidden_layers]
        self.layers = len(self.ratios)

    def count(self, ratio: int) -> int:
        return self.ratios.count(ratio)

    def weights(self) -> Iterator[Component]:
        """Matrices: their bytes once, their FLOP for every token. Rows of embedding and routing
        table are not counted."""
        g, stored = self.geometry, component_bytes(self.geometry)
        d, attention = g.hidden_size, self.layout.attention_tp
        inner = g.num_attention_heads * g.head_dim

        def dense(name: str, dtype: str, macs: float, ways: int, rows: float) -> Component:
            return Component(
                name, "weights", stored.get(name, 0) / ways, {dtype: 2 * macs * rows / ways}
            )

        yield dense(
            "wq_a_wkv", "fp8", self.layers * d * (g.q_lora_rank + g.head_dim), 1, self.local
        )
        yield dense("wq_b", "fp8", self.layers * g.q_lora_rank * inner, attention, self.local)
        yield dense("wo_a", "fp8", self.layers * inner * g.o_lora_rank, attention, self.local)
        yield dense(
            "wo_b", "fp8", self.layers * g.o_groups * g.o_lora_rank * d, attention, self.local
        )
        pooled = self.count(4) * 4 * g.head_dim + self.count(128) * 2 * g.head_dim
        yield dense("compressor", "bf16", pooled * d, 1, self.local)
        yield dense(
            "indexer_compressor", "bf16", self.count(4) * 4 * g.index_head_dim * d, 1, self.local
        )
        projected = g.q_lora_rank * g.index_n_heads * g.index_head_dim + g.index_n_heads * d
        yield dense("indexer", "fp8", self.count(4) * projected, 1, self.local)
        yield dense("gate", "bf16", self.layers * g.n_routed_experts * d, 1, self.local)
        coefficients = g.hc_mult * (2 + g.hc_mult)
        yield dense("mhc", "bf16", self.layers * 2 * coefficients * g.hc_mult * d, 1, self.local)
        yield dense(
            "shared_expert",
            "fp8",
            self.layers * 3 * d * g.moe_intermediate_size,
            self.layout.gpus,
            self.tokens,
        )
        yield self._routed_experts(stored["routed_experts"])
        yield Component(
            "head",
            "weights",
            stored["head"] / self.layout.gpus,
            {"bf16": 2 * g.vocab_size * d * self.sampled / self.layout.gpus},
        )

    def _routed_experts(self, stored: int) -> Component:
        g = self.geometry
        # Experts that at least one token chooses, in expectation, when tokens choose independently
        # and evenly.
        chosen = 1 - (1 - g.num_experts_per_tok / g.n_routed_experts) ** self.tokens
        flops = (
            self.layers
            * g.num_experts_per_tok
            * 6
            * g.hidden_size
            * g.moe_intermediate_size
            * self.tokens
        )
        return Component(
            "routed_experts",
            "weights",
            stored * chosen / self.layout.gpus,
            {"fp8": flops / self.layout.gpus},
        )

    def caches(self, prefill: bool) -> Iterator[Component]:
        """Latents and indexer keys read. Every rank of an attention group holds all of them: one
        latent serves all heads.

        Queries of one request share what they read, so a history is charged once for all of them.
        """
        g = self.geometry
        window = min(g.sliding_window, self.context)
        readers = self.requests_local
        entry_flops = 4 * g.num_attention_heads * g.head_dim * self.local / self.layout.attention_tp
        for name, count, read, attended in (
            ("window", self.layers, self.context if prefill else window, window),
            (
                "selected",
                self.count(4),
                self.context / 4 if prefill else self.visible[4],
                self.visible[4],
            ),
            (
                "compressed_128",
                self.count(128),
                self.context / 128 if prefill else self.visible[128],
                self.visible[128],
            ),
        ):
            yield Component(
                name,
                "caches",
                count * read * SLOT_BYTES * readers,
                {"bf16": count * attended * entry_flops},
            )
        scan = self.count(4) * (self.context / 4 if prefill else self.scanned)
        scores = 2 * g.index_n_heads * g.index_head_dim * self.count(4) * self.scanned * self.local
        yield Component("index_scan", "caches", scan * self.index_bytes * readers, {"fp8": scores})

    def streams(self) -> Component:
        """The residual streams of the hyper-connections, bf16: read to collapse, read and written
        to mix, at two sites."""
        g = self.geometry
        return Component(
            "mhc_streams",
            "activations",
            self.layers * 2 * 3 * g.hc_mult * g.hidden_size * 2 * self.local,
        )

    def collectives(self) -> Iterator[Component]:
        """Bytes that one GPU sends. An all-reduce sends each byte 2 (n-1)/n times, and so do a
        gather and a scatter together."""
        g, layout = self.geometry, self.layout
        token_bytes = g.hidden_size * 2
        ways = layout.attention_tp
        if ways > 1:
            yield Component(
                "attention_reduce",
                "collectives",
                launches=self.layers,
                link_bytes=self.layers * self.local * token_bytes * 2 * (ways - 1) / ways,
            )
        if layout.gpus > 1:
            share = self._expert_traffic(token_bytes)
            yield Component(
                "expert_exchange",
                "collectives",
                launches=self.layers * (2 if layout.dp > 1 else 1),
                link_bytes=self.layers * share,
            )

    def _expert_traffic(self, token_bytes: float) -> float:
        n, g = self.layout.gpus, self.geometry
        reduced = self.tokens * token_bytes * 2 * (n - 1) / n
        if self.layout.ep == 1 or self.layout.dp == 1:
            return reduced
        # Expert parallelism sends a token to the ranks that hold its experts: FP8 there, bf16 back.
        ranks = (n - 1) * (1 - (1 - 1 / n) ** g.num_experts_per_tok)
        return min(reduced, self.tokens / n * ranks * token_bytes * 1.5)

    def launches(self) -> Component:
        per_block = LAUNCHES["attention"] + LAUNCHES["output"] + LAUNCHES["mhc"] + LAUNCHES["moe"]
        kernels = (
            self.layers * per_block
            + (self.count(4) + self.count(128)) * LAUNCHES["compressor"]
            + self.count(4) * LAUNCHES["indexer"]
        )
        return Component("kernels", "launches", launches=kernels)
