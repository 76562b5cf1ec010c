"""Adapters of the host's kernels. Its Triton kernels run interpreted; where the interpreter cannot
(its bf16 has no arithmetic) or the kernel is for NVIDIA, the same in torch stands in its place,
SGLang's own where it has it, so that all but the kernel is checked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4_plugin import ops  # noqa: F401  registers the operators
from dsv4_plugin.cache.stores import PackedIndexCache
from dsv4_plugin.formats import dequantize_fp8, quantize_fp8
from dsv4_plugin.ops.operator import OPERATORS
from dsv4_plugin.runtime.cases import cases, sizes
from dsv4_plugin.runtime.compare import bound, error, outcome, tolerance

pytest.importorskip("sglang")
CPU = torch.device("cpu")
NO_CARRY = 2**-3
"""The interpreter's conversion to e4m3 loses the carry into the exponent and halves such values,
those less than half a step below a power of two. They are a 16th of a binade: a row moves by half
of the root of their share of its squares, 2^-3 at most."""


def calls(operator: str, heads: int = 0) -> list[tuple]:
    """Arguments of `dsv4 verify` for no rows, a decode step and a prefill."""
    found = []
    for size in sizes("pro", CPU, quick=True):
        if heads:
            size = replace(size, geometry=replace(size.geometry, index_n_heads=heads))
        found += [case.arguments() for case in cases(operator, size, CPU, seed=1)]
    return found


def worst(operator: str, run, arguments: tuple) -> float:
    """The largest error of what a call produced."""
    each = OPERATORS[operator]
    named = bound(each, arguments, {})
    want = outcome(each, each.reference(*arguments), named)
    got = outcome(each, run(*arguments), named)
    return max((error(got[name], want[name]) for name in want), default=0.0)


def test_rms_norm_quant():
    from dsv4_plugin.host.kernels.rms_norm_quant import rms_norm_quant

    for x, weight, eps, _ in calls("rms_norm_quant"):
        normed, codes, scale = OPERATORS["rms_norm_quant"].reference(x, weight, eps, "both")
        got = rms_norm_quant(x, weight, eps, "both")
        torch.testing.assert_close(got[0], normed, rtol=2**-7, atol=0)
        assert torch.equal(got[2].log2(), got[2].log2().round()) and got[2].is_contiguous()
        assert error(dequantize_fp8(*got[1:]), dequantize_fp8(codes, scale)) <= NO_CARRY
        assert rms_norm_quant(x, weight, eps, "fp8")[0] is None


def test_block_fp8_linear(monkeypatch):
    from sglang.kernels.ops.gemm import fp8_kernel

    from dsv4_plugin.host.kernels.block_fp8_linear import block_fp8_linear

    # tuned configurations go by the name of the GPU
    monkeypatch.setattr(fp8_kernel, "get_w8a8_block_fp8_configs", lambda *_: None)
    limit = tolerance("linear_fp32", torch.bfloat16).limit
    for x, weight, scale in calls("block_fp8_linear"):
        if weight.shape == (256, 1536):
            assert worst("block_fp8_linear", block_fp8_linear, (x, weight, scale)) <= NO_CARRY
            codes, x_scale = quantize_fp8(x, 128)
            quantised = codes, weight, scale, x_scale, (128, 64, 64)
            assert worst("block_fp8_linear", block_fp8_linear, quantised) <= limit


def latents(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """fp32 [n, 512] at `slots` of uint8 pages [count, slots, 1, 584], 0 for -1, addressed as in the
    host's Triton kernel: 576 bytes a slot, behind those of all slots 8 bytes of scales each."""
    size, stride = pages.shape[1], pages.stride(0)
    memory = pages.as_strided((pages.shape[0] * stride,), (1,), pages.storage_offset())
    data = slots.clamp_min(0) // size * stride + slots.clamp_min(0) % size * 576
    scale = slots.clamp_min(0) // size * stride + size * 576 + slots.clamp_min(0) % size * 8
    row = memory[data[:, None] + torch.arange(576)]
    factor = 2.0 ** (memory[scale[:, None] + torch.arange(7)].float() - 127)
    nope = dequantize_fp8(row[:, :448].contiguous().view(torch.float8_e4m3fn), factor)
    rope = row[:, 448:].contiguous().view(torch.bfloat16).float()
    return torch.cat((nope, rope), 1).masked_fill_((slots < 0)[:, None], 0.0)


def attend_in_torch(
    q, k_cache, head_dim_v, softmax_scale, indices, attn_sink, extra_k_cache,
    extra_indices_in_kvcache, is_fp8_kvcache, **metadata,
):  # fmt: skip
    """What FlashMLA computes, by its documentation, before rounding."""
    assert head_dim_v == 512 and is_fp8_kvcache and q.shape[1] == 1
    assert metadata.keys() == {"block_table", "cache_seqlens", "tile_scheduler_metadata"}
    lists = [(k_cache, indices), (extra_k_cache, extra_indices_in_kvcache)]
    rows = []
    for row in range(q.shape[0]):
        chosen = [(pages, each[row, 0].long()) for pages, each in lists if each is not None]
        keys = torch.cat([latents(pages, slots) for pages, slots in chosen])
        absent = torch.cat([slots for _, slots in chosen]) < 0
        scores = (q[row, 0].float() @ keys.t() * softmax_scale).masked_fill(absent, -torch.inf)
        rows.append(torch.cat((scores, attn_sink[:, None]), 1).softmax(-1)[:, :-1] @ keys)
    return torch.stack(rows).unsqueeze(1).to(q.dtype), None


def test_sparse_mla_around_the_kernel(monkeypatch):
    from dsv4_plugin.host.kernels import sparse_mla

    monkeypatch.setattr(sparse_mla, "attend", attend_in_torch)
    limit = tolerance("sparse_mla", torch.bfloat16).limit
    for arguments in calls("sparse_mla"):
        assert worst("sparse_mla", sparse_mla.sparse_mla, arguments) <= limit


def test_flash_mla_is_given_64_heads(monkeypatch):
    from dsv4_plugin.host.kernels import sparse_mla

    seen = []

    def attend(q, **rest):
        seen.append((q.shape[2], rest["attn_sink"].shape[0], rest["indices"].shape[-1] % 64))
        return attend_in_torch(q, **rest)

    monkeypatch.setattr(sparse_mla, "attend", attend)
    monkeypatch.setattr(sparse_mla, "FLASH_MLA", True)
    monkeypatch.setattr(sparse_mla, "get_mla_metadata", lambda: (None, None), raising=False)
    [arguments, *_] = [each for each in calls("sparse_mla") if each[0].shape[0]]
    limit = tolerance("sparse_mla", torch.bfloat16).limit
    assert worst("sparse_mla", sparse_mla.sparse_mla, arguments) <= limit
    assert seen == [(64, 64, 0)]


def test_indexer_logits_on_the_hosts_torch(monkeypatch):
    import sys
    import types

    from sglang.srt.layers.attention.dsv4.indexer import fp8_paged_mqa_logits_torch

    def logits(q, pages, weights, lengths, table, schedule, width, clean_logits):
        assert lengths.shape == (q.shape[0], 1) and schedule == (64, 132)
        return fp8_paged_mqa_logits_torch(
            q, pages, weights, lengths.squeeze(1), table, None, width, clean_logits
        )

    deep_gemm = types.ModuleType("deep_gemm")
    deep_gemm.get_num_sms = lambda: 132
    deep_gemm.get_paged_mqa_logits_metadata = lambda lengths, block, sms: (block, sms)
    deep_gemm.fp8_paged_mqa_logits = logits
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm)
    monkeypatch.delitem(sys.modules, "dsv4_plugin.host.kernels.indexer_logits", raising=False)
    from dsv4_plugin.host.kernels.indexer_logits import indexer_logits

    limit = tolerance("rms_norm_quant", torch.bfloat16).limit  # the host's torch rounds to bf16
    for arguments in calls("indexer_logits", heads=64):
        assert isinstance(arguments[2], PackedIndexCache)
        assert worst("indexer_logits", indexer_logits, arguments) <= limit
    monkeypatch.delitem(sys.modules, "dsv4_plugin.host.kernels.indexer_logits")
