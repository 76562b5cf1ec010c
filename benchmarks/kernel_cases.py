"""The calls that benchmarks/kernels.py checks and times: released shapes of every operator on the
attention path; those of routing and experts are in expert_cases.py, of hyper-connections, norms and
products in dense_cases.py.

A case is a label, the memory it needs, and a function that makes its tensors. Caches are full of
random latents and keys on shuffled pages; a decode step has one row a request, all of one length; a
prefill is one request from its first token on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import floors
import torch
from torch import Tensor

from dsv4_plugin.cache import (
    PAGE_TOKENS,
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from dsv4_plugin.cache.layout import INDEX_DIM, LATENT_DIM, entry_slots
from dsv4_plugin.cache.step_plan import RING_ROWS, WINDOW, StepPlan, static_windows
from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.ops import build_step_plan
from dsv4_plugin.ops.operator import OPERATORS, Operator
from dsv4_plugin.ops.rope import rotation

EPS = 1e-6
SAMPLE = 16
"""Rows of a call that the reference is asked for."""
# random pages that a larger cache repeats at other addresses, which is all that caches look at
_TEMPLATE_BYTES = 1 << 24


@dataclass(frozen=True)
class Model:
    """One rank's share of a released model."""

    name: str
    heads: int
    index_heads: int
    topk: int
    hidden: int
    q_lora_rank: int
    groups: int
    """Of the output projection."""
    vocab: int


def _model(config: str, name: str, shares: int) -> Model:
    geometry = load_geometry(config)
    return Model(
        name,
        geometry.num_attention_heads // shares,
        geometry.index_n_heads,
        geometry.index_topk,
        geometry.hidden_size,
        geometry.q_lora_rank,
        geometry.o_groups // shares,
        geometry.vocab_size // shares,
    )


MODELS = {
    model.name: model
    for model in (
        _model("pro", "pro-tp8", 8),
        _model("pro", "pro-dp8", 1),
        _model("flash", "flash", 1),
        _model("flash", "flash-tp8", 8),
    )
}


@dataclass(frozen=True)
class Sizes:
    """Which steps are run."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    most_topk: int = 1 << 20
    most_heads: int = 1 << 20
    most_hidden: int = 1 << 20
    """Of hidden channels, those of a low-rank query, and hundredths of the vocabulary."""


FULL = Sizes(
    (1, 8, 32, 128, 512), (1 << 10, 1 << 13, 1 << 17, 1 << 20), (1 << 10, 1 << 11, 1 << 12, 1 << 13)
)
QUICK = Sizes((1, 32), (1 << 13, 1 << 17), (1 << 11,))
TINY = Sizes((2,), (300,), (9,), most_topk=64, most_heads=16, most_hidden=256)
"""What an interpreter finishes: every path of the full sizes, few rows."""


@dataclass(frozen=True)
class Step:
    """Rows of one step and the context they see."""

    phase: str
    requests: int
    context: int
    """Tokens of each request after the step."""

    @property
    def tokens(self) -> int:
        return self.requests if self.phase == "decode" else self.context

    @property
    def label(self) -> str:
        return (
            f"decode {self.requests} x {self.context}"
            if self.phase == "decode"
            else f"prefill {self.context}"
        )

    @property
    def pages(self) -> int:
        """Pages of 256 tokens of one request."""
        return -(-self.context // PAGE_TOKENS)

    def positions(self, device: torch.device) -> Tensor:
        if self.phase == "decode":
            return torch.full((self.requests,), self.context - 1, device=device)
        return torch.arange(self.context, device=device)

    def owners(self, device: torch.device) -> Tensor:
        """Request of each row."""
        return (
            torch.arange(self.tokens, device=device)
            if self.phase == "decode"
            else torch.zeros(self.tokens, dtype=torch.int64, device=device)
        )

    def visible(self, ratio: int) -> int:
        """Entries that all rows see together."""
        return (
            self.requests * (self.context // ratio)
            if self.phase == "decode"
            else sum((position + 1) // ratio for position in range(self.context))
        )


@dataclass
class Call:
    """Arguments of one call, and what its result must be."""

    operator: Operator
    arguments: tuple
    floor: floors.Floor
    rows: int
    part: Callable[[Tensor], tuple] | None = None
    """Arguments that give the reference only these rows; None checks the whole call."""
    poison: list[Tensor] = field(default_factory=list)
    """Bytes that the call overwrites: filled with NaN before it, so that nothing older passes for a
    result."""


@dataclass(frozen=True)
class Case:
    """One call of an operator that can be made when there is memory for it."""

    operator: str
    model: str
    label: str
    memory: int
    """Bytes of all its tensors, results and split parts included."""
    make: Callable[[torch.device], Call]


def pages_of(step: Step, device: torch.device) -> Tensor:
    """int64 [requests, pages]: page table on shuffled pages; page 0 is nobody's."""
    return (
        torch.randperm(step.requests * step.pages, device=device)
        .add_(1)
        .view(step.requests, step.pages)
    )


def _filled(
    cache_type: Callable,
    dim: int,
    pages: int,
    page_bytes: int,
    slots: int,
    device: torch.device,
    *more: int,
) -> Any:
    """A cache of `pages` pages full of random vectors; past some megabytes the pages repeat."""
    template = min(pages, max(1, _TEMPLATE_BYTES // page_bytes))
    memory = torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device)
    cache_type(memory[:template], *more).store(
        torch.arange(template * slots, device=device),
        torch.randn(template * slots, dim, device=device),
    )
    for start in range(template, pages, template):
        end = min(start + template, pages)
        memory[start:end].copy_(memory[: end - start])
    return cache_type(memory, *more)


def latents(pages: int, ratio: int, device: torch.device) -> PackedLatentCache:
    slots = entries_per_page(ratio)
    return _filled(
        PackedLatentCache, LATENT_DIM, pages, latent_page_bytes(slots), slots, device, slots
    )


def index_keys(pages: int, device: torch.device) -> PackedIndexCache:
    return _filled(
        PackedIndexCache, INDEX_DIM, pages, index_page_bytes(), entries_per_page(4), device
    )


def bf16(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(
        *shape, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16
    ).to(torch.bfloat16)


def rotations(positions: Tensor) -> tuple[Tensor, Tensor]:
    return rotation(positions, 160000 ** -(torch.arange(0, 64, 2, device=positions.device) / 64))


def _window(step: Step, device: torch.device) -> tuple[PackedLatentCache, Tensor]:
    """(window cache, window slots of every row): a request holds the pages of its last tokens
    alone."""
    position, owner = step.positions(device).unsqueeze(-1), step.owners(device).unsqueeze(-1)
    seen = position - torch.arange(WINDOW - 1, -1, -1, device=device)
    first = 0 if step.phase == "prefill" else max(step.context - WINDOW, 0) // PAGE_TOKENS
    held = step.pages - first
    table = torch.randperm(step.requests * held, device=device).add_(1).view(step.requests, held)
    slots = (
        table[owner, (seen // PAGE_TOKENS - first).clamp_min(0)] * PAGE_TOKENS + seen % PAGE_TOKENS
    )
    return latents(step.requests * held + 1, 0, device), slots.masked_fill(seen < 0, -1)


def _spread(visible: Tensor, topk: int, width: int) -> Tensor:
    """int64 [T, width]: min(topk, visible) different entries of each row, ascending, spread over
    all it sees; then -1."""
    count = visible.clamp_max(topk).unsqueeze(-1)
    place = torch.arange(width, device=visible.device)
    low, high = (at * visible.unsqueeze(-1) // count.clamp_min(1) for at in (place, place + 1))
    entry = low + (torch.rand(low.shape, device=low.device) * (high - low)).long().clamp_max(
        high - low - 1
    )
    return entry.masked_fill(place >= count, -1)


def _selected(
    step: Step, ratio: int, topk: int, device: torch.device
) -> tuple[PackedLatentCache, Tensor]:
    """(compressed cache, slots of every row): `topk` entries of ratio 4, all entries of ratio
    128."""
    width = min(topk, step.context // 4) if ratio == 4 else step.context // 128
    visible = (step.positions(device) + 1) // ratio
    entries = _spread(visible, width, width)
    table = pages_of(step, device)[step.owners(device)]
    slots = entry_slots(table, entries.clamp_min(0), ratio).masked_fill(entries < 0, -1)
    return latents(step.requests * step.pages + 1, ratio, device), slots


def _attention(model: Model, ratio: int, step: Step, topk: int) -> Case:
    def make(device: torch.device) -> Call:
        cache, slots = _selected(step, ratio, topk, device)
        window_cache, window = _window(step, device)
        q, sink = (
            bf16(step.tokens, model.heads, 512, device=device),
            torch.randn(model.heads, device=device),
        )
        there = [part[part >= 0] for part in (window, slots)]
        floor = floors.sparse_mla(
            step.tokens,
            model.heads,
            sum(part.numel() for part in there),
            sum(part.unique().numel() for part in there),
        )
        scale = 512**-0.5
        cos, sin = rotations(step.positions(device))
        return Call(
            OPERATORS["sparse_mla"],
            (q, window_cache, window, cache, slots, sink, scale, cos, sin),
            floor,
            step.tokens,
            lambda rows: (
                q[rows],
                window_cache,
                window[rows],
                cache,
                slots[rows],
                sink,
                scale,
                cos[rows],
                sin[rows],
            ),
        )

    width = min(topk, step.context // 4) if ratio == 4 else step.context // 128
    pools = (step.requests * step.pages + 1) * latent_page_bytes(entries_per_page(ratio))
    pools += (
        step.requests
        * (2 if step.phase == "decode" else step.pages)
        * latent_page_bytes(PAGE_TOKENS)
    )
    rows = step.tokens * (model.heads * 2 * 1024 + 5 * 8 * (width + WINDOW))
    split_parts = min(32, 4096 // step.tokens + 1) * step.tokens * model.heads * 513 * 4
    checked = SAMPLE * (width + WINDOW) * LATENT_DIM * 4 * 3
    label = f"{step.label}, c{ratio}, {model.heads} heads, {width + WINDOW} slots"
    return Case("sparse_mla", model.name, label, pools + rows + split_parts + checked, make)


def _plan(step: Step, device: torch.device) -> StepPlan:
    """The part of a plan that the indexer reads."""
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    position, owner = step.positions(device), step.owners(device)
    query = torch.zeros_like(position) if step.phase == "decode" else position
    return StepPlan(
        position,
        owner,
        query,
        1 if step.phase == "decode" else step.context,
        step.context,
        nothing,
        nothing,
        pages_of(step, device),
        {},
    )


def _logits(model: Model, step: Step, topk: int) -> Case:
    def make(device: torch.device) -> Call:
        plan, cache = _plan(step, device), index_keys(step.requests * step.pages + 1, device)
        q = (
            bf16(step.tokens, model.index_heads, INDEX_DIM, device=device)
            .mul_(50)
            .to(torch.float8_e4m3fn)
        )
        weights = torch.randn(step.tokens, model.index_heads, device=device) * 2**-6

        def part(rows: Tensor) -> tuple:
            owners, request = plan.request[rows].unique(return_inverse=True)
            query = (
                torch.zeros_like(rows)
                if step.phase == "decode"
                else torch.arange(len(rows), device=device)
            )
            some = StepPlan(
                plan.position[rows],
                request,
                query,
                int(query.max()) + 1,
                plan.max_seq_len,
                plan.window_write,
                plan.window,
                plan.page_table[owners],
                {},
            )
            return q.view(torch.uint8)[rows].view(q.dtype), weights[rows], cache, some

        entries = step.requests * (step.context // 4)
        floor = floors.indexer_logits(step.tokens, model.index_heads, step.visible(4), entries)
        return Call(
            OPERATORS["indexer_logits"], (q, weights, cache, plan), floor, step.tokens, part
        )

    memory = (step.requests * step.pages + 1) * index_page_bytes() + step.tokens * (
        step.context // 4
    ) * 4 * 2
    checked = 2 * (step.context // 4) * (INDEX_DIM * 8 + SAMPLE * 4 * 3)
    return Case(
        "indexer_logits",
        model.name,
        f"{step.label}, {model.index_heads} heads",
        memory + checked + step.tokens * model.index_heads * INDEX_DIM * 4,
        make,
    )


def _topk(model: Model, step: Step, topk: int) -> Case:
    entries = step.context // 4

    def make(device: torch.device) -> Call:
        visible = (step.positions(device) + 1) // 4
        logits = torch.randn(step.tokens, entries, device=device)
        logits.masked_fill_(
            torch.arange(entries, device=device) >= visible.unsqueeze(-1), float("-inf")
        )
        floor = floors.topk_select(step.tokens, step.visible(4), min(topk, entries))
        return Call(
            OPERATORS["topk_select"],
            (logits, visible, topk),
            floor,
            step.tokens,
            lambda rows: (logits[rows], visible[rows], topk),
        )

    return Case(
        "topk_select", model.name, f"{step.label}, top {topk}", step.tokens * entries * 4 * 4, make
    )


def _tables(step: Step, device: torch.device, lengths: Tensor | None = None) -> dict[str, Any]:
    """Arguments of build_step_plan; `lengths` of the requests after a decode step where they
    differ."""
    requests, pages = step.requests, step.pages
    within = torch.arange(PAGE_TOKENS, device=device)
    slot_table = torch.zeros(requests + 1, pages * PAGE_TOKENS, dtype=torch.int32, device=device)
    slot_table[1:] = (pages_of(step, device).unsqueeze(-1) * PAGE_TOKENS + within).flatten(1)
    to_window = torch.zeros(
        (requests * pages + 1) * PAGE_TOKENS + 1, dtype=torch.int64, device=device
    )
    to_window[PAGE_TOKENS:-1] = (
        pages_of(step, device).view(-1, 1) * PAGE_TOKENS + within
    ).flatten()
    to_window[-1] = -1
    seq_lens = torch.full((requests,), step.context, device=device) if lengths is None else lengths
    owner, row = step.owners(device), torch.arange(1, requests + 1, device=device)
    position = seq_lens - 1 if step.phase == "decode" else step.positions(device)
    return {
        "position": position,
        "request": owner,
        "out_slot": slot_table[row[owner], position].long(),
        "prefix_lens": seq_lens - (1 if step.phase == "decode" else step.context),
        "seq_lens": seq_lens,
        "slot_table": slot_table,
        "slot_row": row,
        "full_to_window": to_window,
        "max_queries": 1 if step.phase == "decode" else step.context,
        "max_seq_len": step.context,
    }


def _tables_memory(step: Step) -> int:
    return step.requests * step.pages * PAGE_TOKENS * (4 + 8) * 2


def _step_plan(model: Model, step: Step, topk: int) -> Case:
    def make(device: torch.device) -> Call:
        windows = {ratio: static_windows(step.tokens, step.requests, ratio) for ratio in RING_ROWS}
        return Call(
            OPERATORS["build_step_plan"],
            tuple(_tables(step, device).values()),
            floors.build_step_plan(step.tokens, step.requests * step.pages, windows),
            step.tokens,
        )

    return Case(
        "build_step_plan",
        model.name,
        step.label,
        _tables_memory(step) + step.tokens * (128 * 8 * 8 + 4096),
        make,
    )


def _compress(model: Model, ratio: int, dim: int, step: Step) -> Iterator[Case]:
    """In a decode step every request completes a window; with more than one also the usual step,
    where one in `ratio` does."""

    def case(complete: bool) -> Case:
        def make(device: torch.device) -> Call:
            lengths = None
            if not complete:
                lengths = step.context - torch.arange(step.requests, device=device) % ratio
            rows = build_step_plan.reference(
                **_tables(step, device, lengths), static_rows=True
            ).compression[ratio]
            width = dim * rows.halves
            owners = step.requests * step.pages + 1 if ratio == 4 else step.requests + 1
            projected = torch.randn(step.tokens, 2 * width, device=device)
            ring = torch.randn(owners * RING_ROWS[ratio], 2 * width, device=device)
            ape, weight = torch.randn(ratio, width, device=device), bf16(dim, device=device)
            pages = step.requests * step.pages + 1
            cache = index_keys(pages, device) if dim == INDEX_DIM else latents(pages, ratio, device)
            floor = floors.compress(
                int((rows.token >= 0).sum()), int((rows.ring_write_row >= 0).sum()), ratio, dim
            )
            return Call(
                OPERATORS["compress"],
                (
                    projected,
                    ring,
                    rows,
                    ape,
                    weight,
                    EPS,
                    *rotations(rows.position),
                    cache,
                    torch.bfloat16,
                    dim == INDEX_DIM,
                ),
                floor,
                step.tokens,
                poison=[cache.pages],
            )

        kind = f"c{ratio}" + (" index" if dim == INDEX_DIM else "")
        page_bytes = (
            index_page_bytes() if dim == INDEX_DIM else latent_page_bytes(entries_per_page(ratio))
        )
        windows = static_windows(step.tokens, step.requests, ratio)
        columns = 2 * dim * floors.window_items(ratio) // ratio
        owners = step.requests * step.pages if ratio == 4 else step.requests
        memory = (step.requests * step.pages + 1) * page_bytes + 2 * owners * RING_ROWS[
            ratio
        ] * columns * 4
        memory += (
            2 * _tables_memory(step)
            + windows * floors.window_items(ratio) * dim * 4 * 12
            + step.tokens * columns * 8
        )
        label = f"{step.label.split(' x ')[0]}, {kind}" + (
            ""
            if step.phase == "prefill"
            else ", all complete"
            if complete
            else f", one in {ratio} completes"
        )
        return Case("compress", model.name, label, memory, make)

    yield case(True)
    if step.phase == "decode" and step.requests > 1:
        yield case(False)


def _store(model: Model, step: Step, topk: int) -> Case:
    def make(device: torch.device) -> Call:
        cache, tokens = latents(step.tokens // PAGE_TOKENS + 2, 0, device), step.tokens
        q, kv, weight = (
            bf16(tokens, model.heads, 512, device=device),
            bf16(tokens, 512, device=device),
            bf16(512, device=device),
        )
        turn = rotations(torch.randint(0, 1 << 20, (tokens,), device=device))
        slots = torch.randperm(tokens, device=device) + PAGE_TOKENS
        return Call(
            OPERATORS["qk_norm_rope_store"],
            (q, kv, weight, EPS, *turn, slots, cache),
            floors.qk_norm_rope_store(tokens, model.heads),
            tokens,
            lambda rows: (
                q[rows],
                kv[rows],
                weight,
                EPS,
                *(each[rows] for each in turn),
                slots[rows],
                cache,
            ),
            poison=[cache.pages],
        )

    return Case(
        "qk_norm_rope_store",
        model.name,
        f"{step.label.split(' x ')[0]}, {model.heads} heads",
        step.tokens * (model.heads * 3 * 1024 + 4096) + (1 << 22),
        make,
    )


def _index_query(model: Model, step: Step, topk: int) -> Case:
    def make(device: torch.device) -> Call:
        q, weights = (
            bf16(step.tokens, model.index_heads, 128, device=device),
            torch.randn(step.tokens, model.index_heads, device=device),
        )
        turn = rotations(torch.randint(0, 1 << 20, (step.tokens,), device=device))
        return Call(
            OPERATORS["rope_hadamard_quant"],
            (q, weights, *turn, "fp8"),
            floors.rope_hadamard_quant(step.tokens, model.index_heads),
            step.tokens,
            lambda rows: (q[rows], weights[rows], *(each[rows] for each in turn), "fp8"),
        )

    return Case(
        "rope_hadamard_quant",
        model.name,
        f"{step.label.split(' x ')[0]}, {model.index_heads} heads",
        step.tokens * model.index_heads * 128 * 12,
        make,
    )


import dense_cases  # noqa: E402 - they take their types from here
import expert_cases  # noqa: E402

_BY_CONTEXT = {"sparse_mla", "indexer_logits", "topk_select", "build_step_plan"}
_MAKERS: dict[str, Callable[[Model, Step, int], Iterator[Case]]] = {
    "sparse_mla": lambda *a: (
        _attention(a[0], ratio, *a[1:]) for ratio in (4, 128) if a[1].context >= ratio
    ),
    "indexer_logits": lambda *a: iter((_logits(*a),)),
    "topk_select": lambda *a: iter((_topk(*a),)),
    "compress": lambda model, step, topk: (
        case
        for ratio, dim in ((4, LATENT_DIM), (4, INDEX_DIM), (128, LATENT_DIM))
        for case in _compress(model, ratio, dim, step)
    ),
    "qk_norm_rope_store": lambda *a: iter((_store(*a),)),
    "rope_hadamard_quant": lambda *a: iter((_index_query(*a),)),
    "build_step_plan": lambda *a: iter((_step_plan(*a),)),
    **dense_cases.MAKERS,
    **expert_cases.MAKERS,
}
NAMES = tuple(_MAKERS)
"""Operators that have cases."""


def _shrunk(model: Model, sizes: Sizes) -> Model:
    """The model within the most of `sizes`."""
    heads = min(model.heads, sizes.most_heads)
    return replace(
        model,
        heads=heads,
        hidden=min(model.hidden, sizes.most_hidden),
        q_lora_rank=min(model.q_lora_rank, sizes.most_hidden),
        vocab=min(model.vocab, 100 * sizes.most_hidden),
    )


def cases(operators: list[str], models: list[str], sizes: Sizes) -> Iterator[Case]:
    """Every shape once: one that several models have, as its label says, belongs to the first of
    them."""
    seen = set()
    for operator in operators:
        contexts = sizes.contexts if operator in _BY_CONTEXT else (2 * PAGE_TOKENS,)
        steps = [Step("decode", batch, context) for context in contexts for batch in sizes.batches]
        steps += [Step("prefill", 1, tokens) for tokens in sizes.prefills]
        for model in (_shrunk(MODELS[name], sizes) for name in models):
            for step in steps:
                for case in _MAKERS[operator](model, step, min(model.topk, sizes.most_topk)):
                    if (operator, case.label) not in seen:
                        seen.add((operator, case.label))
                        yield case
