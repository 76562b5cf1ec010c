"""A DSpark draft in plain float64, one request at a time, written from docs/model.md §3.8 alone.

It shares no code with the package but the reading of the file: weights are decoded here, window and
block are concatenated, and nothing is cached.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def decoded(tensors: dict[str, Tensor], name: str) -> Tensor:
    """float64 values of a released tensor (docs/model.md §2)."""
    tensor = tensors[name]
    scale = tensors.get(name.removesuffix("weight") + "scale")
    if scale is None:
        return tensor.double()
    factor = torch.exp2(scale.view(torch.uint8).double() - 127)
    if tensor.dtype == torch.int8:
        codes = tensor.view(torch.uint8).long()
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
        values = E2M1[codes & 7] * (1 - 2 * (codes >> 3))
        return values * factor.repeat_interleave(32, 1)
    rows, columns = tensor.shape
    factor = factor.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return tensor.double() * factor[:rows, :columns]


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    return x if weight is None else x * weight


def rotated(x: Tensor, position: Tensor, sign: int = 1) -> Tensor:
    """The last 64 channels turned by their position; theta 10000, pairs of neighbours."""
    frequency = 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    angle = sign * position.double().unsqueeze(-1) * frequency
    angle = angle.view(*position.shape, *[1] * (x.dim() - position.dim() - 1), 32)
    pairs = torch.view_as_complex(x[..., 448:].unflatten(-1, (32, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((x[..., :448], torch.view_as_real(turned).flatten(-2)), -1)


class Drafted(NamedTuple):
    """What the draft gives for one anchor."""

    hidden: Tensor
    """[γ, d] before the head's norm."""
    base: Tensor
    """[γ, V] without what the markov head adds."""
    logits: Tensor
    tokens: list[int]
    confidence: Tensor


class Reference:
    """The draft of the checkpoint in `directory`."""

    def __init__(self, directory: Path, config: dict):
        tensors = load_file(directory / "model.safetensors")
        self.w = {
            name: decoded(tensors, name)
            for name in tensors
            if name.startswith(("mtp.", "embed.", "head.")) and not name.endswith(".scale")
        }
        self.c, self.block = config, config["dspark_block_size"]
        self.stages = len(config["compress_ratios"]) - config["num_hidden_layers"]

    def draft(self, taps: Tensor, anchor: int) -> Drafted:
        """`taps` [p, a·d] of the tokens before `anchor`, which is at position p."""
        w, p = self.w, taps.shape[0]
        x_context = rms(taps @ w["mtp.0.main_proj.weight"].T, w["mtp.0.main_norm.weight"])
        ids = [anchor] + [self.c["dspark_noise_token_id"]] * (self.block - 1)
        streams = w["embed.weight"][ids].unsqueeze(1).repeat(1, 4, 1)
        for stage in range(self.stages):
            streams = self._stage(f"mtp.{stage}.", streams, x_context, p)
        last = f"mtp.{self.stages - 1}."
        m = rms(streams.flatten(1)) @ w[last + "hc_head_fn"].T
        pre = torch.sigmoid(m * w[last + "hc_head_scale"] + w[last + "hc_head_base"])
        hidden = ((pre + self.c["hc_eps"]).unsqueeze(-1) * streams).sum(1)
        base = rms(hidden, w[last + "norm.weight"]) @ w["head.weight"].T
        tokens, logits, confidence = [], [], []
        previous = anchor
        for j in range(self.block):
            e = w[last + "markov_head.markov_w1.weight"][previous]
            logits.append(base[j] + w[last + "markov_head.markov_w2.weight"] @ e)
            previous = int(logits[-1].argmax())
            tokens.append(previous)
            features = torch.cat((hidden[j], e))
            confidence.append(torch.sigmoid(w[last + "confidence_head.proj.weight"][0] @ features))
        return Drafted(hidden, base, torch.stack(logits), tokens, torch.stack(confidence))

    def _stage(self, prefix: str, streams: Tensor, x_context: Tensor, p: int) -> Tensor:
        for site, layer in (("attn", self._attention), ("ffn", self._experts)):
            w = [self.w[f"{prefix}hc_{site}_{part}"] for part in ("fn", "base", "scale")]
            pre, post, comb = self._mixing(streams, *w)
            x = rms((pre.unsqueeze(-1) * streams).sum(1), self.w[f"{prefix}{site}_norm.weight"])
            y = layer(prefix, x, x_context, p)
            mixed = (comb.unsqueeze(-1) * streams.unsqueeze(2)).sum(1)
            streams = post.unsqueeze(-1) * y.unsqueeze(1) + mixed
        return streams

    def _mixing(self, streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor):
        eps = self.c["hc_eps"]
        m = rms(streams.flatten(1)) @ fn.T
        pre = torch.sigmoid(m[:, :4] * scale[0] + base[:4]) + eps
        post = 2 * torch.sigmoid(m[:, 4:8] * scale[1] + base[4:8])
        comb = (m[:, 8:] * scale[2] + base[8:]).unflatten(1, (4, 4)).softmax(-1) + eps
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        for _ in range(self.c["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
        return pre, post, comb

    def _attention(self, prefix: str, x: Tensor, x_context: Tensor, p: int) -> Tensor:
        w = {name: self.w[f"{prefix}attn.{name}.weight"] for name in ("wq_a", "wq_b", "wkv")}
        position, seen = torch.arange(p, p + self.block), torch.arange(max(0, p - 128), p)
        q = rms(x @ w["wq_a"].T, self.w[prefix + "attn.q_norm.weight"]) @ w["wq_b"].T
        q = rotated(rms(q.unflatten(1, (-1, 512))), position)
        keys = torch.cat((x_context[seen] @ w["wkv"].T, x @ w["wkv"].T))
        keys = rms(keys, self.w[prefix + "attn.kv_norm.weight"])
        keys = rotated(keys, torch.cat((seen, position)))
        scores = torch.einsum("thd,kd->thk", q, keys) / math.sqrt(512)
        sink = self.w[prefix + "attn.attn_sink"].view(1, -1, 1).expand(self.block, -1, 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        o = rotated(torch.einsum("thk,kd->thd", weights, keys), position, -1)
        groups = self.c["o_groups"]
        o = o.flatten(1).unflatten(1, (groups, -1))
        a = self.w[prefix + "attn.wo_a.weight"].unflatten(0, (groups, -1))
        return torch.einsum("tgi,goi->tgo", o, a).flatten(1) @ self.w[prefix + "attn.wo_b.weight"].T

    def _experts(self, prefix: str, x: Tensor, *_) -> Tensor:
        prefix += "ffn."
        g = torch.nn.functional.softplus(x @ self.w[prefix + "gate.weight"].T).sqrt()
        chosen = (g + self.w[prefix + "gate.bias"]).topk(self.c["num_experts_per_tok"]).indices
        weight = g.gather(1, chosen)
        weight = weight / weight.sum(1, keepdim=True) * self.c["routed_scaling_factor"]
        y = self._expert(prefix + "shared_experts.", x)
        for row, (experts, weights) in enumerate(zip(chosen.tolist(), weight)):
            for expert, share in zip(experts, weights):
                y[row] += share * self._expert(f"{prefix}experts.{expert}.", x[row])
        return y

    def _expert(self, prefix: str, x: Tensor) -> Tensor:
        limit = self.c["swiglu_limit"]
        a = (x @ self.w[prefix + "w1.weight"].T).clamp(max=limit)
        b = (x @ self.w[prefix + "w3.weight"].T).clamp(-limit, limit)
        return (torch.nn.functional.silu(a) * b) @ self.w[prefix + "w2.weight"].T
