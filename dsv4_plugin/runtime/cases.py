"""Fresh random arguments for every operator, in the shapes that DeepSeek-V4-Pro and -Flash give it,
scaled to fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..cache import (
    PAGE_TOKENS,
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from ..cache.step_plan import phase
from ..cache.stores import SlotStore
from ..checkpoint.released import load_geometry
from ..config import Geometry
from ..formats import quantize_weight_fp4, quantize_weight_fp8
from ..ops import build_step_plan
from ..ops.rope import inverse_frequencies, rotation
from ..ops.step_plan import StepPlan
from .pool import Pages

MODELS = ("pro", "flash")


@dataclass(frozen=True)
class Size:
    """One rank's share of a model, and the step it runs."""

    name: str
    geometry: Geometry
    heads: int
    groups: int
    experts: int
    intermediate: int
    prefix: tuple[int, ...]
    """Tokens of each request before the step."""
    new: tuple[int, ...]
    """Tokens that the step adds to each."""

    @property
    def rows(self) -> int:
        return sum(self.new)


def sizes(name: str, device: torch.device, quick: bool) -> list[Size]:
    """Steps of model `name` on one of eight ranks: an idle rank's 0 rows, decode, and prefill
    chunks.

    On a CPU the width, the heads and the number of experts shrink; head geometry and formats stay
    real.
    """
    full = load_geometry(name)
    if device.type == "cpu":
        full = replace(
            full,
            hidden_size=512,
            q_lora_rank=256,
            o_lora_rank=128,
            index_n_heads=8,
            index_topk=64,
            n_routed_experts=16,
            vocab_size=1024,
        )
        share = dict(heads=8, groups=2, experts=4, intermediate=256)
    else:
        share = dict(
            heads=full.num_attention_heads // 8,
            groups=full.o_groups // 8,
            experts=full.n_routed_experts // 8,
            intermediate=full.moe_intermediate_size,
        )
    long, chunk = (600, 9) if device.type == "cpu" else (9000, 70)
    steps = [((), ()), ((3, 300, long), (1, 1, 1)), ((0, 126, long), (chunk, 5, 1))]
    if not quick and device.type != "cpu":
        steps += [((long,) * 64, (1,) * 64), ((0, 5000), (2048, 1024))]
    return [Size(name, full, **share, prefix=prefix, new=new) for prefix, new in steps]


class Data:
    """Makes the tensors of one step from a seed: the same seed gives the same tensors."""

    def __init__(self, size: Size, device: torch.device, seed: int):
        self.size, self.geometry, self.device = size, size.geometry, device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.bfloat16, mean: float = 0.0, std: float = 1.0
    ) -> Tensor:
        return (
            (mean + std * torch.randn(shape, generator=self._generator)).to(dtype).to(self.device)
        )

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator).to(self.device)

    def rows(self, *shape: int) -> Tensor:
        """bf16 activations [T, ...], rows of sizes that differ by orders of magnitude."""
        x = self.normal(self.size.rows, *shape)
        return x * torch.logspace(-1, 1, max(x.shape[0], 1), device=self.device, dtype=x.dtype)[
            : x.shape[0]
        ].view(-1, *[1] * len(shape))

    def fp8_weight(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        weight = self.normal(
            out_features, in_features, dtype=torch.float32, std=in_features**-0.5
        ).cpu()
        return tuple(part.to(self.device) for part in quantize_weight_fp8(weight))

    def expert_weights(self, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
        """One random FP4 matrix, scaled differently for each expert."""
        weight, scale = quantize_weight_fp4(
            self.normal(out_features, in_features, dtype=torch.float32, std=in_features**-0.5).cpu()
        )
        exponents = torch.randint(-1, 2, (self.size.experts, 1, 1), generator=self._generator)
        scales = (
            (scale.view(torch.uint8).to(torch.int16) + exponents)
            .to(torch.uint8)
            .view(torch.float8_e8m0fnu)
        )
        return weight.expand(self.size.experts, -1, -1).contiguous().to(self.device), scales.to(
            self.device
        )

    def rotations(self, ratio: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotation(positions, inverse_frequencies(self.geometry, ratio).to(self.device))

    def plan_arguments(self) -> dict[str, Any]:
        """Arguments of build_step_plan over shuffled pages."""
        size = self.size
        prefix = torch.tensor(size.prefix, dtype=torch.int64)
        new = torch.tensor(size.new, dtype=torch.int64)
        seq_lens = prefix + new
        longest = max(seq_lens.tolist(), default=0)
        count = -(-(longest + 1) // PAGE_TOKENS) * max(len(size.new), 1) + 1
        pages, windows = Pages(count, seed=1), Pages(count, seed=2)
        table = torch.zeros(len(size.new) + 2, count * PAGE_TOKENS, dtype=torch.int32)
        to_window = torch.zeros(count * PAGE_TOKENS + 1, dtype=torch.int64)
        within = torch.arange(PAGE_TOKENS)
        for row, length in enumerate(seq_lens.tolist()):
            taken = -(-length // PAGE_TOKENS)
            for place, (page, window) in enumerate(zip(pages.take(taken), windows.take(taken))):
                table[row + 1, place * PAGE_TOKENS : (place + 1) * PAGE_TOKENS] = (
                    page * PAGE_TOKENS + within
                )
                to_window[page * PAGE_TOKENS + within] = window * PAGE_TOKENS + within
        request = torch.arange(len(size.new)).repeat_interleave(new)
        position = prefix[request] + torch.arange(size.rows) - (new.cumsum(0) - new)[request]
        row = torch.arange(1, len(size.new) + 1)
        tensors = dict(
            position=position,
            request=request,
            out_slot=table[row[request], position].to(torch.int64),
            prefix_lens=prefix,
            seq_lens=seq_lens,
            slot_table=table,
            slot_row=row,
            full_to_window=to_window,
        )
        return {name: tensor.to(self.device) for name, tensor in tensors.items()} | dict(
            max_queries=max(size.new, default=0), max_seq_len=longest
        )

    def plan(self) -> StepPlan:
        return build_step_plan.reference(**self.plan_arguments())

    def pages(self) -> int:
        return self.plan_arguments()["full_to_window"].shape[0] // PAGE_TOKENS + 1

    def latents(self, ratio: int) -> SlotStore:
        """A packed cache full of random latents; ratio 0 for the window."""
        slots, pages = entries_per_page(ratio), self.pages()
        cache = PackedLatentCache(
            torch.zeros(pages, latent_page_bytes(slots), dtype=torch.uint8, device=self.device),
            slots,
        )
        cache.store(
            torch.arange(pages * slots, device=self.device), self.normal(pages * slots, 512)
        )
        return cache

    def index_keys(self) -> SlotStore:
        pages = self.pages()
        cache = PackedIndexCache(
            torch.zeros(pages, index_page_bytes(), dtype=torch.uint8, device=self.device)
        )
        cache.store(
            torch.arange(pages * 64, device=self.device),
            self.normal(pages * 64, 128, dtype=torch.float32),
        )
        return cache


def _norm(d: Data):
    yield (
        "hidden",
        lambda: (
            (
                d.rows(d.geometry.hidden_size),
                d.normal(d.geometry.hidden_size, mean=1.0, std=0.1),
                1e-6,
                "both",
            )
        ),
    )


def _linear(d: Data):
    g = d.geometry
    for label, outputs, inputs in (
        ("wq_a", g.q_lora_rank, g.hidden_size),
        ("wq_b", d.size.heads * 512, g.q_lora_rank),
        ("wkv", 512, g.hidden_size),
        ("few results of many channels", 256, 1536),
    ):
        yield (
            label,
            lambda outputs=outputs, inputs=inputs: (
                d.rows(inputs),
                *d.fp8_weight(outputs, inputs),
            ),
        )


def _linear_fp32(d: Data):
    g = d.geometry
    yield (
        "compressor and indexer",
        lambda: (d.rows(g.hidden_size), d.normal(2624, g.hidden_size, std=g.hidden_size**-0.5)),
    )


def _store(d: Data):
    def make():
        plan = d.plan()
        return (
            d.rows(d.size.heads, 512),
            d.rows(512),
            d.normal(512, mean=1.5, std=0.1),
            1e-6,
            *d.rotations(4, plan.position),
            plan.window_write,
            d.latents(0),
        )

    yield "window", make


def _index_query(d: Data):
    def make():
        heads = d.geometry.index_n_heads
        weights = d.normal(d.size.rows, heads, dtype=torch.float32)
        return d.rows(heads, 128), weights, *d.rotations(4, d.plan().position), "fp8"

    yield "fp8", make


def _compress(d: Data):
    for label, ratio, dim in (("c4", 4, 512), ("c128", 128, 512), ("c4 index", 4, 128)):

        def make(ratio=ratio, dim=dim):
            rows = d.plan().compression[ratio]
            halves = rows.halves
            owners = d.pages() if ratio == 4 else len(d.size.new) + 2
            ring = d.normal(
                owners * (8 if ratio == 4 else 128), 2 * halves * dim, dtype=torch.float32
            )
            projected = d.normal(d.size.rows, 2 * halves * dim, dtype=torch.float32)
            cache = d.index_keys() if dim == 128 else d.latents(ratio)
            return (
                projected,
                ring,
                rows,
                d.normal(ratio, halves * dim, dtype=torch.float32),
                d.normal(dim, mean=1.5, std=0.1),
                1e-6,
                *d.rotations(ratio, rows.position),
                cache,
                torch.bfloat16,
                dim == 128,
            )

        yield label, make


def _logits(d: Data):
    def make():
        heads = d.geometry.index_n_heads
        q = d.normal(d.size.rows, heads, 128, dtype=torch.float32).to(torch.float8_e4m3fn)
        return (
            q,
            d.normal(d.size.rows, heads, dtype=torch.float32, std=0.01),
            d.index_keys(),
            d.plan(),
        )

    yield "c4", make


def _topk(d: Data):
    def make():
        plan = d.plan()
        # A coarse grid makes many logits equal: ties go to the lowest entry.
        logits = (d.normal(d.size.rows, plan.max_seq_len // 4, dtype=torch.float32) * 8).round() / 8
        return logits, plan.visible(4), d.geometry.index_topk

    yield "c4", make


def _step_plan(d: Data):
    yield "step", lambda: tuple(d.plan_arguments().values())


def _attention(d: Data):
    for label, ratio in (("window", 0), ("c4", 4), ("c128", 128)):

        def make(ratio=ratio):
            plan = d.plan()
            compressed = slots = None
            if ratio:
                compressed, slots = d.latents(ratio), plan.dense_slots
            if ratio == 4:
                seen = plan.visible(4).unsqueeze(-1)
                width = min(d.geometry.index_topk, plan.max_seq_len // 4)
                slots = plan.request_slots(4)[plan.request][:, :width]
                slots = slots.masked_fill(torch.arange(width, device=d.device) >= seen, -1)
            return (
                d.rows(d.size.heads, 512),
                d.latents(0),
                plan.window,
                compressed,
                slots,
                d.normal(d.size.heads, dtype=torch.float32),
                512**-0.5,
                *d.rotations(ratio, plan.position),
            )

        yield label, make


def _output(d: Data):
    def make():
        size, g = d.size, d.geometry
        inputs = size.heads // size.groups * 512
        return (
            d.rows(size.heads, 512),
            *d.fp8_weight(size.groups * g.o_lora_rank, inputs),
            size.groups,
        )

    yield "wo_a", make


def _mhc_parameters(d: Data, outputs: int, scales: int) -> tuple[Tensor, ...]:
    width, fp32 = 4 * d.geometry.hidden_size, torch.float32
    return (
        d.normal(outputs, width, dtype=fp32, std=width**-0.5),
        d.normal(outputs, dtype=fp32, std=0.4),
        d.normal(scales, dtype=fp32, mean=1.0, std=0.3),
        d.normal(d.geometry.hidden_size, mean=1.0, std=0.1),
    )


_SITE = (20, 1e-6, 1e-6, True)


def _mhc_pre(d: Data):
    yield (
        "site",
        lambda: (d.rows(4, d.geometry.hidden_size), *_mhc_parameters(d, 24, 3), *_SITE),
    )


def _mhc_output(d: Data) -> tuple[Tensor, ...]:
    """(y, streams, post, comb) of a sub-layer that ran."""
    comb = d.normal(d.size.rows, 4, 4, dtype=torch.float32).softmax(-1)
    return (
        d.rows(d.geometry.hidden_size),
        d.rows(4, d.geometry.hidden_size),
        d.normal(d.size.rows, 4, dtype=torch.float32).sigmoid(),
        comb,
    )


def _mhc_post(d: Data):
    yield "site", lambda: _mhc_output(d)


def _mhc_post_pre(d: Data):
    yield "site", lambda: (*_mhc_output(d), *_mhc_parameters(d, 24, 3), *_SITE)


def _mhc_head(d: Data):
    yield "head", lambda: (d.rows(4, d.geometry.hidden_size), *_mhc_parameters(d, 4, 1), 1e-6, 1e-6)


def _route(d: Data):
    g = d.geometry
    for label, hashed in (("learned", False), ("hash", True)):

        def make(hashed=hashed):
            gate = d.normal(g.n_routed_experts, g.hidden_size, std=g.hidden_size**-0.5)
            bias = None if hashed else d.normal(g.n_routed_experts, dtype=torch.float32, std=0.3)
            table = (
                d.normal(g.vocab_size, g.n_routed_experts, dtype=torch.float32)
                .argsort(-1)[:, :6]
                .contiguous()
            )
            return (
                d.rows(g.hidden_size),
                gate,
                bias,
                table if hashed else None,
                d.integers(g.vocab_size, d.size.rows),
                6,
                g.routed_scaling_factor,
            )

        yield label, make


def _moe(d: Data):
    def make():
        size, g = d.size, d.geometry
        order = d.normal(size.rows, g.n_routed_experts, dtype=torch.float32).argsort(-1)
        experts = order[:, :6].contiguous()
        w1, w2, w3 = (
            d.expert_weights(*shape)
            for shape in (
                (size.intermediate, g.hidden_size),
                (g.hidden_size, size.intermediate),
                (size.intermediate, g.hidden_size),
            )
        )
        return (
            d.normal(size.rows, g.hidden_size),
            d.normal(size.rows, 6, dtype=torch.float32).sigmoid(),
            experts,
            *w1,
            *w2,
            *w3,
            g.swiglu_limit,
            size.experts,
        )

    yield "fp4", make


def _shared(d: Data):
    def make():
        inner, hidden = (
            (d.size.intermediate // 8 if d.device.type != "cpu" else d.size.intermediate),
            d.geometry.hidden_size,
        )
        inner = max(inner // 128, 1) * 128
        return (
            d.normal(d.size.rows, hidden),
            *d.fp8_weight(inner, hidden),
            *d.fp8_weight(hidden, inner),
            *d.fp8_weight(inner, hidden),
            d.geometry.swiglu_limit,
        )

    yield "fp8", make


def _greedy(d: Data):
    # Rounded logits tie at the maximum: the lowest id wins.
    yield (
        "vocabulary",
        lambda: (d.normal(len(d.size.new), d.geometry.vocab_size, dtype=torch.float32).round(),),
    )


MAKERS: dict[str, Callable[[Data], Iterator[tuple[str, Callable[[], tuple]]]]] = {
    "rms_norm_quant": _norm,
    "block_fp8_linear": _linear,
    "linear_fp32": _linear_fp32,
    "qk_norm_rope_store": _store,
    "rope_hadamard_quant": _index_query,
    "compress": _compress,
    "indexer_logits": _logits,
    "topk_select": _topk,
    "build_step_plan": _step_plan,
    "sparse_mla": _attention,
    "grouped_output": _output,
    "mhc_pre": _mhc_pre,
    "mhc_post": _mhc_post,
    "mhc_post_pre": _mhc_post_pre,
    "mhc_head": _mhc_head,
    "route": _route,
    "moe": _moe,
    "shared_expert": _shared,
    "sample_greedy": _greedy,
}
"""By operator: (label, function that makes the arguments) pairs of one step."""


@dataclass(frozen=True)
class Case:
    """One call: `arguments` makes fresh, equal arguments every time."""

    operator: str
    label: str
    phase: str
    arguments: Callable[[], tuple]


def cases(operator: str, size: Size, device: torch.device, seed: int) -> Iterator[Case]:
    """The calls of `operator` in one step of `size`."""
    labels = [label for label, _ in MAKERS[operator](Data(size, device, seed))]
    for index, label in enumerate(labels):

        def make(index=index):
            return list(MAKERS[operator](Data(size, device, seed)))[index][1]()

        kind = phase(max(size.new, default=0))
        yield Case(operator, f"{size.name} {label}, {size.rows} rows", kind, make)
