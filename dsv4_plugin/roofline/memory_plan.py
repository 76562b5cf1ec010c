"""Where the memory of one GPU goes when it serves: weights, the pool of caches, the largest step.

Weights are summed from the table of released tensors; a test holds the sum against the modules that
a process makes. The pool is counted as SGLang's DeepSeek-V4 pool counts itself (docs/host.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..cache.layout import (
    INDEX_PAGE_ENTRIES,
    PAGE_TOKENS,
    WINDOW_SHARE,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from ..config import Geometry
from .layout import Layout, LayoutError
from .weights import holdings

MEMORY_FRACTION = 0.9
"""Share of the memory for weights and pool: --mem-fraction-static where the user gives none."""
CHUNK = 8192
"""Tokens of the largest step: --chunked-prefill-size."""
RUNNING_REQUESTS = 256
"""Requests that decode at once: SGLang's default for this model."""
RUNTIME_BYTES = 2e9
"""ASSUMPTION, not measured here: the device's context, code objects and collectives' buffers."""
SCORE_BYTES = 1 << 30
"""The indexer scores in blocks of rows that stay below this (model/attention.py)."""
SPLIT_ROWS, SPLIT_CHUNKS = 256, 8
"""A product of so few rows hands over sums of so many parts (kernels/triton/product.py)."""

GROUPS = {
    "routed experts": ("routed_experts",),
    "shared expert": ("shared_expert",),
    "attention": ("wq_a_wkv", "wq_b", "wo_a", "wo_b"),
    "compressors and indexers": ("compressor", "indexer", "indexer_compressor"),
    "embedding and head": ("embedding", "head"),
    "routing, streams, norms": ("gate", "tid2eid", "mhc", "norms_and_sinks"),
}
"""What a reader of the plan sees as one, by component of weights.py. Drafts are a group of their
own."""
DRAFT = "draft"


class MemoryPlanError(ValueError):
    """A model that does not fit the memory of the device."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device."""

    layout: Layout
    memory: float
    """Of the device."""
    fraction: float
    """Of the memory that weights and pool may take; the rest is for a step's workspace."""
    weights: dict[str, float]
    """By GROUPS, and DRAFT when the draft is loaded."""
    token: float
    """What one token of history adds to the pool, its share of window slots included."""
    request: float
    """Compressor state that one running request holds whatever its length."""
    requests: int
    """Running requests that the pool is made for."""
    workspace: dict[str, float]
    """Tensors of the largest step that live at the same time."""
    most_tokens: int | None = None
    """Cached tokens that were asked for, where they are not to fill the memory."""

    @property
    def weight_bytes(self) -> float:
        return sum(self.weights.values())

    @property
    def room(self) -> float:
        """Bytes that are left for cached tokens; negative when weights and states alone are too
        many."""
        return self.memory * self.fraction - self.weight_bytes - self.request * (self.requests + 1)

    @property
    def tokens(self) -> int:
        """Tokens of history that fit, in whole pages, one more of which is never handed out."""
        fit = int(self.room / self.token) // PAGE_TOKENS * PAGE_TOKENS - PAGE_TOKENS
        return max(fit if self.most_tokens is None else min(fit, self.most_tokens), 0)

    @property
    def pool_bytes(self) -> float:
        return self.tokens * self.token + self.request * (self.requests + 1)

    @property
    def workspace_bytes(self) -> float:
        return sum(self.workspace.values())

    def request_bytes(self, tokens: int) -> float:
        """What one running request of `tokens` tokens costs."""
        return self.request + tokens * self.token

    def lacking(self, context: int = PAGE_TOKENS) -> str | None:
        """What does not fit beside one request of `context` tokens, in one sentence, or None."""
        usable = self.memory * self.fraction
        if self.weight_bytes > usable:
            return (
                f"{gigabytes(self.weight_bytes)} of weights are more than the"
                f" {gigabytes(usable)} that weights and caches may take of each device"
            )
        if self.tokens < context:
            return (
                f"beside {gigabytes(self.weight_bytes)} of weights and the state of"
                f" {self.requests} requests there is room for {self.tokens:,} cached tokens, not"
                f" for {context:,}"
            )
        rest = self.memory - self.weight_bytes - self.pool_bytes
        if self.workspace_bytes > rest:
            return (
                f"the largest step needs {gigabytes(self.workspace_bytes)} and {gigabytes(rest)}"
                " are left for it"
            )
        return None


def memory_plan(
    geometry: Geometry,
    layout: Layout,
    memory: float,
    *,
    requests: int = RUNNING_REQUESTS,
    context: int | None = None,
    chunk: int = CHUNK,
    fraction: float = MEMORY_FRACTION,
    draft: bool = False,
    dense: int | None = None,
    most_tokens: int | None = None,
) -> MemoryPlan:
    """The plan of one device with `memory` bytes under `layout`.

    `context` is the longest request (the model's maximum when None), `chunk` the tokens of a
    prefill step and `requests` those of a decode step, of one replica of the attention. With
    `draft` the draft blocks are loaded too, their windows are cached, the rings of the compressors
    are doubled (docs/model.md §4) and a step verifies drafts. `dense` is the element size in bytes
    when matrices are decoded at loading, as on a CPU; None keeps them packed. `most_tokens` bounds
    the cache. Raises LayoutError when the layout does not fit the geometry.
    """
    layout.check(geometry)
    return MemoryPlan(
        layout,
        memory,
        fraction,
        _weights(geometry, layout, draft, dense),
        _token_bytes(geometry, draft),
        _request_bytes(geometry, draft),
        requests,
        _workspace(geometry, layout, chunk, context or geometry.max_position_embeddings, requests)
        | _drafting(geometry, layout, requests, draft),
        most_tokens,
    )


def layouts_that_fit(
    plan: MemoryPlan, geometry: Geometry, context: int, sizes: Iterable[int] = (1, 2, 4, 8, 16)
) -> list[str]:
    """Names of tensor-parallel layouts under which the same plan fits, fewest GPUs first."""
    found = []
    for size in sizes:
        try:
            other = Layout(size)
            other.check(geometry)
        except LayoutError:
            continue
        weights = _weights(geometry, other, DRAFT in plan.weights, None)
        if replace(plan, layout=other, weights=weights).lacking(context) is None:
            found.append(other.name)
    return found


def main_lines(plan: MemoryPlan, context: int, where: str) -> tuple[str, str, str]:
    """Weights, caches and largest step of a plan in a line each; `where` names the device."""
    largest = max(plan.weights, key=plan.weights.get)
    of = f" on each of {plan.layout.gpus}" if plan.layout.gpus > 1 else ""
    return (
        f"weights {gigabytes(plan.weight_bytes)}{of} ({largest}"
        f" {gigabytes(plan.weights[largest])}), of {gigabytes(plan.memory)} of {where}",
        f"caches {gigabytes(plan.pool_bytes)}:"
        f" {plan.tokens:,} tokens for {plan.requests} requests; one of {context:,} tokens costs"
        f" {gigabytes(plan.request_bytes(context))}",
        f"largest step {gigabytes(plan.workspace_bytes)}",
    )


def gigabytes(size: float) -> str:
    """Such as "109.5 GB" (10^9 bytes), or "3.4 MB" below a tenth of it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _weights(
    geometry: Geometry, layout: Layout, draft: bool, dense: int | None
) -> dict[str, float]:
    names = {component: group for group, parts in GROUPS.items() for component in parts}
    weights = dict.fromkeys(GROUPS, 0.0)
    for holding in holdings(geometry):
        if holding.mtp and not draft:
            continue
        group = DRAFT if holding.mtp else names[holding.component]
        size = holding.bytes if dense is None else holding.decoded(dense)
        share = layout.held.get(holding.group, 1)
        weights[group] = weights.get(group, 0.0) + size / share
    return weights


def _token_bytes(geometry: Geometry, draft: bool) -> float:
    """Bytes that a token slot adds to SGLang's pool (pool_configurator.py, layout v4); a draft has
    a pool of windows of its own, under the same slots."""
    ratios = geometry.compress_ratios[: geometry.num_hidden_layers]
    four, long = ratios.count(4), ratios.count(128)
    ring = 16 if draft else 8
    # A row of the ratio-4 ring is fp32 [k | score], each twice as wide as a head.
    state = ring / PAGE_TOKENS * 4 * 4 * (geometry.head_dim + geometry.index_head_dim) * four
    windows = len(ratios) + (geometry.num_layers - geometry.num_hidden_layers if draft else 0)
    window = windows * latent_page_bytes(PAGE_TOKENS) / PAGE_TOKENS + state
    entries = {
        ratio: latent_page_bytes(entries_per_page(ratio)) / PAGE_TOKENS for ratio in (4, 128)
    }
    index = index_page_bytes() / INDEX_PAGE_ENTRIES / 4
    return WINDOW_SHARE * window + four * (entries[4] + index) + long * entries[128]


def _request_bytes(geometry: Geometry, draft: bool) -> float:
    """The ratio-128 rings of one request: rows of fp32 [k | score]."""
    ring = 256 if draft else 128
    long = geometry.compress_ratios[: geometry.num_hidden_layers].count(128)
    return long * ring * 2 * geometry.head_dim * 4


def _workspace(
    geometry: Geometry, layout: Layout, rows: int, context: int, requests: int
) -> dict[str, float]:
    """Tensors of a step of `rows` tokens that live at the same time. A test holds them against what
    the launchers allocate (tests/compile/test_workspace.py)."""
    d, streams = geometry.hidden_size, rows * geometry.hc_mult * geometry.hidden_size * 2
    intermediate = geometry.moe_intermediate_size // (layout.gpus // layout.ep)
    # Stage 1 takes x in FP8 once more and leaves FP8; stage 2 leaves a row for each choice, bf16,
    # beside their sums in fp32. 96 bytes: a choice's routing, and its places among its expert's.
    together = rows * layout.dp  # experts work on the rows of all replicas of the attention
    choices = together * geometry.num_experts_per_tok
    experts = choices * (intermediate + d * 2 + 96) + together * d * (1 + 4)
    if layout.dp > 1:
        experts += together * 2 * (d * 2 + geometry.num_experts_per_tok * 8)  # gathered, and cut
    mixing = streams + rows * d * 2  # of the sub-layer before
    return {
        "residual streams": streams,
        "normed rows, bf16 and FP8": rows * d * (2 + 1),
        "the largest of mixing, attention and experts": max(
            mixing, _attention_workspace(geometry, layout, rows, context), experts
        ),
        "logits": requests * geometry.vocab_size / layout.attention_tp * 4,
        "runtime (assumed)": RUNTIME_BYTES,
    }


def _drafting(geometry: Geometry, layout: Layout, requests: int, draft: bool) -> dict[str, float]:
    """Logits of the rows that a step verifies, in the place of one a request, and those that a
    DSpark draft picked from, which are of the whole vocabulary everywhere."""
    if not draft:
        return {}
    drafted = geometry.dspark.block_size if geometry.dspark else 1
    row = requests * geometry.vocab_size * 4
    logits = {"logits": (drafted + 1) * row / layout.attention_tp}
    return logits | ({"logits of the draft": drafted * row} if geometry.dspark else {})


def _attention_workspace(geometry: Geometry, layout: Layout, rows: int, context: int) -> float:
    """Of a layer of ratio 4, the largest: projections, then the scores of a block of rows with the
    candidates of their selection, or the output of attention."""
    heads = geometry.num_attention_heads // layout.attention_tp * geometry.head_dim
    index = geometry.index_n_heads * geometry.index_head_dim
    low_rank = geometry.q_lora_rank + geometry.head_dim
    compressed = 4 * (geometry.head_dim + geometry.index_head_dim) + geometry.index_n_heads
    projected = rows * (2 * low_rank + 2 * (heads + index) + 4 * compressed)
    queries = rows * (2 * heads + index)
    slots = rows * geometry.index_topk * 4
    scores = min(rows * -(-context // 4) * 4, SCORE_BYTES) if 4 in geometry.compress_ratios else 0
    split = min(rows, SPLIT_ROWS) * SPLIT_CHUNKS * low_rank * 4
    return projected + queries + 2 * slots + max(scores * 9 / 8, rows * 2 * heads) + split
