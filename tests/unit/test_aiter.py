"""Adapters of aiter around its kernels, which need its GPU: each kernel is replaced by what aiter's
documentation says that it computes, in torch, and the whole held to the operator's reference."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from dsv4_plugin.formats import dequantize_fp8, dequantize_weight, hadamard
from dsv4_plugin.ops.operator import OPERATORS
from dsv4_plugin.ops.rope import apply_rope
from dsv4_plugin.runtime.cases import cases, sizes
from dsv4_plugin.runtime.compare import errors, tolerance

CPU = torch.device("cpu")


def per_group_quant_hip(x, quant_dtype, group_size):
    blocks = x.float().unflatten(-1, (-1, group_size))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448.0
    return (blocks / scale).to(quant_dtype).flatten(-2), scale.squeeze(-1)


def _norm(x, weight, eps):
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()


def mhc_pre(
    residual, fn, hc_scale, hc_base, rms_eps, hc_pre_eps, hc_sinkhorn_eps, hc_post_mult_value,
    sinkhorn_repeat, norm_weight=None, norm_eps=1e-6,
):  # fmt: skip
    """(post [m, 4, 1], comb [m, 4, 4], normed input [m, h])."""
    x = residual.flatten(1).float()
    mixes = x @ fn.t() * (x.square().mean(-1, keepdim=True) + rms_eps).rsqrt()
    pre, post, comb = mixes.split((4, 4, 16), -1)
    pre = (pre * hc_scale[0] + hc_base[:4]).sigmoid() + hc_pre_eps
    post = (post * hc_scale[1] + hc_base[4:8]).sigmoid() * hc_post_mult_value
    comb = (comb * hc_scale[2] + hc_base[8:]).view(-1, 4, 4).softmax(-1) + hc_sinkhorn_eps
    comb = comb / (comb.sum(-2, keepdim=True) + hc_sinkhorn_eps)
    for _ in range(sinkhorn_repeat - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hc_sinkhorn_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc_sinkhorn_eps)
    u = (pre.unsqueeze(-1) * residual.float()).sum(1).bfloat16()
    return post.unsqueeze(-1), comb, _norm(u, norm_weight, norm_eps).bfloat16()


def mhc_post(out, x, residual, post_layer_mix, comb_res_mix):
    mixed = (comb_res_mix.unsqueeze(-1) * residual.float().unsqueeze(2)).sum(1)
    out.copy_(post_layer_mix * x.float().unsqueeze(1) + mixed)


def mhc_fused_post_pre(
    layer_input, residual_in, post_layer_mix, comb_res_mix, norm_weight=None, norm_eps=1e-6, **rest
):
    streams = torch.empty_like(residual_in)
    mhc_post(streams, layer_input, residual_in, post_layer_mix.unsqueeze(-1), comb_res_mix)
    return *mhc_pre(streams, norm_weight=norm_weight, norm_eps=norm_eps, **rest), streams


def fused_qk_rmsnorm_group_quant(
    q_out_quantized, q_out_scale, q, q_weight, q_epsilon, q_out_unquantized=None, group_size=128
):
    y = _norm(q, q_weight, q_epsilon)
    if q_out_unquantized is not None:
        q_out_unquantized.copy_(y)
    if q_out_quantized is not None:
        codes, scale = per_group_quant_hip(y, q_out_quantized.dtype, group_size)
        q_out_quantized.copy_(codes)
        q_out_scale.copy_(scale)


def greedy_sample(out, input):
    """The lowest id among the largest; a row without a number gives 0."""
    out.copy_(input.float().masked_fill(input.isnan(), -torch.inf).argmax(-1))


def gemm_a8w8_blockscale(XQ, WQ, x_scale, w_scale, dtype):
    assert w_scale.dtype == torch.float32
    return (dequantize_fp8(XQ, x_scale) @ dequantize_weight(WQ, w_scale).t()).to(dtype)


def rope_rotate_activation(out, input, cos, sin, positions, rope_dim, out_scale, group_size):
    assert cos.dtype == sin.dtype == input.dtype and rope_dim == 2 * cos.shape[-1]
    turned = apply_rope(input.float(), cos[positions].float(), sin[positions].float())
    codes, scale = per_group_quant_hip(hadamard(turned), out.dtype, group_size)
    out.copy_(codes)
    out_scale.copy_(scale)


def _latents(pages, slots):
    """fp32 [n, 512] of uint8 pages [count, slots, 584]: 576 bytes a slot, behind those of all
    slots 8 bytes of scales each."""
    size, stride = pages.shape[1], pages.stride(0)
    memory = pages.as_strided((pages.shape[0] * stride,), (1,), pages.storage_offset())
    page, place = slots // size * stride, slots % size
    row = memory[(page + place * 576)[:, None] + torch.arange(576)]
    scale = memory[(page + size * 576 + place * 8)[:, None] + torch.arange(7)]
    nope = row[:, :448].contiguous().view(torch.float8_e4m3fn)
    rope = row[:, 448:].contiguous().view(torch.bfloat16)
    return torch.cat((dequantize_fp8(nope, 2.0 ** (scale.float() - 127)), rope.float()), 1)


def pa_decode_sparse(
    q, unified_kv, kv_indices, kv_indptr, attn_sink, softmax_scale,
    *, extra_cache=None, extra_indices=None, extra_indptr=None,
):  # fmt: skip
    lists = [(unified_kv, kv_indices, kv_indptr)]
    if extra_cache is not None:
        lists.append((extra_cache, extra_indices, extra_indptr))
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        keys = []
        for pages, slots, begins in lists:
            assert slots.dtype == begins.dtype == torch.int32
            chosen = slots[begins[row] : begins[row + 1]].long()
            keys.append(_latents(pages, chosen[chosen >= 0]))
        keys = torch.cat(keys)
        scores = torch.cat((q[row].float() @ keys.t() * softmax_scale, attn_sink[:, None]), 1)
        out[row] = scores.softmax(-1)[:, :-1] @ keys
    return out


KERNELS = {
    "ops.mhc": (mhc_pre, mhc_post, mhc_fused_post_pre),
    "ops.quant": (per_group_quant_hip, rope_rotate_activation),
    "ops.fused_qk_rmsnorm_group_quant": (fused_qk_rmsnorm_group_quant,),
    "ops.sample": (greedy_sample,),
    "ops.gemm_op_a8w8": (gemm_a8w8_blockscale,),
    "ops.triton.attention.pa_decode_sparse": (pa_decode_sparse,),
}


@pytest.fixture
def aiter(monkeypatch):
    """As if aiter were here, for adapters that are imported anew."""
    for name, functions in KERNELS.items():
        parts = ["aiter", *name.split(".")]
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if not getattr(sys.modules.get(path), "__stands_in__", False):
                monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
                sys.modules[path].__stands_in__ = True
        for function in functions:
            setattr(sys.modules[".".join(parts)], function.__name__, function)
    yield
    for name in [each for each in sys.modules if each.startswith("dsv4_plugin.kernels.aiter.")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name", [name for name, each in OPERATORS.items() if "aiter" in each.implementations]
)
def test_what_surrounds_the_kernel(aiter, name):
    operator = OPERATORS[name]
    module, _, function = operator.implementations["aiter"].path.partition(":")
    run = getattr(importlib.import_module(module), function)
    for size in sizes("pro", CPU, quick=True):
        for case in cases(name, size, CPU, seed=1):
            arguments = case.arguments()
            _, found = errors(operator, run, arguments, {})
            limit = tolerance(name, arguments[0].dtype).limit
            assert max(found.values(), default=0.0) <= limit, (case.label, found)


def test_an_aiter_that_lacks_an_argument_is_named(aiter):
    def old(residual, fn):
        pass

    sys.modules["aiter.ops.mhc"].mhc_pre = old
    with pytest.raises(ImportError, match="old of aiter .* has no argument norm_weight, norm_eps"):
        importlib.import_module("dsv4_plugin.kernels.aiter.mhc")


def test_the_head_of_a_split_vocabulary(aiter):
    from dsv4_plugin.parallel import Group

    run = importlib.import_module("dsv4_plugin.kernels.aiter.sample_greedy").sample_greedy
    logits = torch.randn(5, 64).round()
    logits[1], logits[2, :32], logits[3] = -torch.inf, -torch.inf, torch.nan
    shares = logits.chunk(2, 1)
    asked: list[torch.Tensor] = []

    def ask(rank):
        """This rank's first pass notes what it sends, the second reads what all sent."""
        asked.clear()
        run(shares[rank], Group(rank, 2, all_gather=lambda x: (asked.append(x), x[None])[1]))
        return list(asked)

    sent = list(zip(ask(0), ask(1)))
    for rank in range(2):
        gathered = iter([torch.stack(both) for both in sent])
        got = run(shares[rank], Group(rank, 2, all_gather=lambda _, each=gathered: next(each)))
        assert torch.equal(got, OPERATORS["sample_greedy"].reference(logits))


def test_modules_are_named_for_every_operator():
    from dsv4_plugin.kernels.aiter import MODULES

    assert set(MODULES) == {
        name for name, each in OPERATORS.items() if "aiter" in each.implementations
    }
