"""DeepseekV4 of this package made to learn: whole sequences at once, with gradients, through the
quantisers.

Every operator but attention is the package's own reference. Attention over paged caches becomes
attention over blocks of 128 tokens of a batch, of the same formulas (docs/model.md §3.2-3.4); tests
hold both to the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.formats import (
    dequantize_weight,
    hadamard,
    quantize_weight_fp4,
    quantize_weight_fp8,
    round_to_fp4,
    round_to_fp8,
)
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.model.attention import Attention, Compressor, Indexer
from dsv4_plugin.model.linear import Activation, Linear
from dsv4_plugin.ops import grouped_output
from dsv4_plugin.ops.block_fp8_linear import linear_fp32
from dsv4_plugin.ops.rms_norm_quant import rms_norm
from dsv4_plugin.ops.rope import apply_rope, rotation

WINDOW = 128


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `x`."""
    return x + (rounded - x).detach()


class Rounded(nn.Module):
    """A weight as its released format stores it, with the gradient of the weight behind it."""

    def __init__(self, stored: str):
        super().__init__()
        self.quantize = quantize_weight_fp4 if stored == "fp4" else quantize_weight_fp8

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.detach().flatten(0, -2)
        if self.quantize is quantize_weight_fp8 and weight.dim() > 2:
            raise ValueError("stacked FP8 experts are not trained here")
        return straight_through(weight, dequantize_weight(*self.quantize(rows)).view_as(weight))


@dataclass
class Lesson:
    """A batch [B, T] and what its layers leave for the loss.

    `rounding` applies the roundings of `official` precision to what is cached; `sparse` restricts
    ratio-4 attention to the indexer's choice.
    """

    token_ids: Tensor
    batch: int
    rotations: dict[int, tuple[Tensor, Tensor]]
    rounding: bool
    sparse: bool
    index_logits: list[Tensor] = field(default_factory=list)
    """[B, T, E] of each indexer, -inf where an entry is not visible."""
    entry_attention: list[Tensor] = field(default_factory=list)
    """[B, T, h, E] probabilities of each ratio-4 layer's entries."""
    previous_attention: list[Tensor] = field(default_factory=list)
    """[B, T - 1] probability that head 0 of each window layer gives the token before, from the
    second token on."""
    rows: None = None
    """Of attention replicas (`model.step.Step`): there are none."""

    @property
    def length(self) -> int:
        return self.token_ids.shape[0] // self.batch


def _pool(compressor: Compressor, x: Tensor) -> Tensor:
    """Entries [B, T // ratio, D] of `x` [B, T, d], before norm (docs/model.md §3.3)."""
    ratio, count = compressor.ratio, x.shape[1] // compressor.ratio
    x = x[:, : count * ratio]
    values = linear_fp32(x, compressor.wkv.weight).unflatten(1, (count, ratio))
    scores = linear_fp32(x, compressor.wgate.weight).unflatten(1, (count, ratio)) + compressor.ape
    if ratio == 4:
        values, scores = (
            _overlapping(part, empty) for part, empty in ((values, 0.0), (scores, float("-inf")))
        )
    return (scores.softmax(2) * values).sum(2)


def _overlapping(windows: Tensor, empty: float) -> Tensor:
    """[B, n, 8, D] of [B, n, 4, 2D]: the a-half of the window before, then the b-half of this
    one."""
    before, here = windows.chunk(2, -1)
    first = torch.full_like(before[:, :1], empty)
    return torch.cat((torch.cat((first, before[:, :-1]), 1), here), 2)


def _entries(compressor: Compressor, x: Tensor, rotation_rows: tuple[Tensor, Tensor]) -> Tensor:
    """Normed and rotated entries [B, E, D] of `x` [B, T, d]."""
    entries = rms_norm(_pool(compressor, x), compressor.norm.weight, compressor.eps)
    at = slice(0, entries.shape[1] * compressor.ratio, compressor.ratio)
    cos, sin = (part[: x.shape[1]][at].repeat(x.shape[0], 1) for part in rotation_rows)
    return apply_rope(entries.flatten(0, 1), cos, sin).view_as(entries)


def round_latent(latent: Tensor) -> Tensor:
    nope = latent[..., :448]
    return torch.cat(
        (straight_through(nope, round_to_fp8(nope.detach(), 64)), latent[..., 448:]), -1
    )


def _index_logits(indexer: Indexer, x: Tensor, qr: Tensor, lesson: Lesson) -> Tensor:
    """[B, T, E] scores of the indexer on inputs that take no gradient from it."""
    x, qr = x.detach(), qr.detach()
    keys = hadamard(_entries(indexer.compressor, x, lesson.rotations[4]))
    q = indexer.wq_b(qr).view(*x.shape[:2], indexer.heads, indexer.dim)
    cos, sin = (part.repeat(x.shape[0], 1) for part in lesson.rotations[4])
    q = hadamard(apply_rope(q.flatten(0, 1), cos, sin)).view_as(q)
    if lesson.rounding:
        keys, q = (straight_through(each, round_to_fp4(each.detach())) for each in (keys, q))
    weights = linear_fp32(x, indexer.weights_proj.weight) * (
        indexer.dim**-0.5 * indexer.heads**-0.5
    )
    logits = 0
    for head in range(indexer.heads):
        logits = logits + weights[..., head, None] * F.relu(q[:, :, head] @ keys.transpose(1, 2))
    return logits


def _visible(length: int, ratio: int) -> Tensor:
    """bool [T, T // ratio]: which entries a token sees."""
    return torch.arange(length // ratio) < ((torch.arange(length) + 1) // ratio).unsqueeze(-1)


class BlockAttention(Attention):
    """Attention of one layer over a batch of whole sequences; the class of trained layers in place
    of Attention."""

    def forward(self, x: Activation, lesson: Lesson) -> Tensor:
        """[B·T, d] of normed `x` [B·T, d]; T is a multiple of 128."""
        x = x.values
        batch, length = lesson.batch, lesson.length
        cos, sin = (part.repeat(batch, 1) for part in lesson.rotations[self.ratio])
        qr = rms_norm(self.wq_a(x), self.q_norm.weight, self.eps)
        q = rms_norm(self.wq_b(qr).unflatten(-1, (self.heads, self.head_dim)), None, self.eps)
        q = apply_rope(q, cos, sin).view(batch, length, self.heads, self.head_dim)
        latents = apply_rope(rms_norm(self.wkv(x), self.kv_norm.weight, self.eps), cos, sin).view(
            batch, length, -1
        )
        rows, low = x.view(batch, length, -1), qr.view(batch, length, -1)
        entries = mask = None
        if self.ratio:
            entries = _entries(self.compressor, rows, lesson.rotations[self.ratio])
            mask = _visible(length, self.ratio).expand(batch, -1, -1)
        if lesson.rounding:
            latents = round_latent(latents)
            entries = None if entries is None else round_latent(entries)
        if self.ratio == 4:
            logits = _index_logits(self.indexer, rows, low, lesson).masked_fill(
                ~mask, float("-inf")
            )
            lesson.index_logits.append(logits)
            if lesson.sparse and logits.shape[-1] > self.indexer.topk:
                chosen = torch.zeros_like(logits, dtype=torch.bool)
                chosen.scatter_(-1, logits.detach().topk(self.indexer.topk).indices, True)
                mask = mask & chosen
        o, p = _attend(q, latents, entries, mask, self.attn_sink, self.softmax_scale)
        if self.ratio == 4:
            lesson.entry_attention.append(p[..., 2 * WINDOW + 1 :])
        if not self.ratio:
            before = torch.arange(length) % WINDOW + WINDOW - 1
            lesson.previous_attention.append(p[:, torch.arange(1, length), 0, before[1:]])
        o = apply_rope(o.flatten(0, 1), cos, sin, inverse=True)
        z = grouped_output(o, self.wo_a.weight, None, self.groups)
        return self.wo_b(z)


def _attend(
    q: Tensor,
    latents: Tensor,
    entries: Tensor | None,
    mask: Tensor | None,
    sink: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(output [B, T, h, D], probabilities [B, T, h, 256 + 1 + E] of two blocks, sink and entries)
    of `q` [B, T, h, D].

    A block of 128 queries sees two blocks of latents, masked to the window, and `entries` [B, E, D]
    where `mask` [B, T, E]; one softmax with `sink` [h] in its denominator (docs/model.md §3.2).
    """
    batch, length, heads, dim = q.shape
    blocks = length // WINDOW
    here = latents.view(batch, blocks, WINDOW, dim)
    keys = torch.cat((F.pad(here, (0, 0, 0, 0, 1, 0))[:, :-1], here), 2)
    rows = q.view(batch, blocks, WINDOW * heads, dim)
    window = (rows @ keys.transpose(2, 3)).view(batch, blocks, WINDOW, heads, 2 * WINDOW)
    at = torch.arange(WINDOW).unsqueeze(-1) + WINDOW - torch.arange(2 * WINDOW)
    seen = ((at >= 0) & (at < WINDOW)).expand(blocks, -1, -1).clone()
    seen[0, :, :WINDOW] = False
    window = window.masked_fill(~seen.unsqueeze(2), float("-inf")).view(batch, length, heads, -1)
    parts = [window, sink.view(1, 1, -1, 1).expand(batch, length, -1, 1) / scale]
    if entries is not None:
        compressed = (q.flatten(1, 2) @ entries.transpose(1, 2)).view(batch, length, heads, -1)
        parts.append(compressed.masked_fill(~mask.unsqueeze(2), float("-inf")))
    p = (torch.cat(parts, -1) * scale).softmax(-1)
    o = (p[..., : 2 * WINDOW].reshape(batch, blocks, WINDOW * heads, -1) @ keys).view_as(q)
    if entries is not None:
        o = o + (p[..., 2 * WINDOW + 1 :].flatten(1, 2) @ entries).view_as(q)
    return o, p


def trainable(geometry: Geometry, quantized: bool) -> DeepseekV4:
    """A DeepseekV4 whose parameters take gradients; with `quantized` its matrices round as the
    release stores them."""
    model = DeepseekV4(geometry, Precision.EXACT)
    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.__class__ = BlockAttention
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if quantized:
        round_weights(model)
    return model


def round_weights(model: DeepseekV4) -> None:
    """From now on matrices round as the release stores them; the parameters behind them stay
    exact."""
    from dsv4_plugin.checkpoint.schema import expected_tensors

    expected = expected_tensors(model.geometry)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            stacked = module.weight.dim() == 3
            stored = (
                model.geometry.expert_dtype
                if stacked
                else "fp8"
                if name + ".scale" in expected
                else "bf16"
            )
            if stored != "bf16":
                parametrize.register_parametrization(module, "weight", Rounded(stored), unsafe=True)


def learn(
    model: DeepseekV4, tokens: Tensor, rounding: bool, sparse: bool, draft: bool = False
) -> tuple[Tensor, Tensor | None, Lesson]:
    """(hidden [B·T, d] before the head, of the MTP block too with `draft`, Lesson) of `tokens`
    int64 [B, T].

    Row t of the MTP block predicts token t + 2; its last row of a sequence means nothing.
    """
    batch, length = tokens.shape
    positions = torch.arange(length)
    rotations = {
        ratio: rotation(positions, getattr(model, f"frequencies_{ratio}"))
        for ratio in {*model.geometry.compress_ratios}
    }
    lesson = Lesson(tokens.flatten(), batch, rotations, rounding, sparse)
    streams = model.embedded(lesson.token_ids).unsqueeze(1).expand(-1, model.geometry.hc_mult, -1)
    for layer in model.layers:
        streams = layer(streams, lesson)
    hidden = model.collapse(streams)
    if not draft:
        return hidden, None, lesson
    following = Lesson(tokens.roll(-1, 1).flatten(), batch, rotations, rounding, sparse)
    drafted = model.mtp[0](model.embedded(following.token_ids), streams, following)
    return hidden, model.mtp[0].collapse(drafted), lesson
