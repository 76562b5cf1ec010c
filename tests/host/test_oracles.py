"""References in plain torch that SGLang's wheel carries for its own DeepSeek-V4 kernels: the bytes
of the K cache, Sinkhorn, index logits over pages, and attention. None is ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsv4_plugin.cache import (
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from dsv4_plugin.ops import indexer_logits, sparse_mla
from dsv4_plugin.ops.mhc import sinkhorn

WINDOW = 128


@pytest.fixture(scope="module")
def k_cache():
    from sglang.test.kernels.deepseek_v4 import k_cache_reference

    return k_cache_reference


def packed(k_cache, latents):
    """bf16 `latents` [n, 512] as the host's kernel of that file packs them: a power of two per 64
    channels, so that the largest fits 448."""
    from sglang.kernels.ops.kvcache.dsv4_main_kv_store import NopeFp8RopeBf16Pack

    nope = latents[:, :448].float().unflatten(-1, (7, 64))
    exponent = (nope.abs().amax(-1).clamp_min(1e-8) / 448).log2().ceil()
    scaled = (nope * (-exponent).exp2().unsqueeze(-1)).clamp(-448, 448)
    return NopeFp8RopeBf16Pack(
        k_nope_fp8=scaled.flatten(1).to(k_cache.fp8_dtype).contiguous(),
        k_rope_bf16=latents[:, 448:].contiguous(),
        scale_k_nope_ue8m0=(exponent + 127).to(torch.uint8).contiguous(),
    )


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_pages_of_latents_hold_the_same_bytes_and_read_back_alike(k_cache, ratio):
    slots_per_page = entries_per_page(ratio) if ratio else 256
    pages = torch.zeros(3, latent_page_bytes(slots_per_page), dtype=torch.uint8)
    theirs, ours = pages.clone(), PackedLatentCache(pages, slots_per_page)
    slots = torch.randperm(3 * slots_per_page)[: min(100, 2 * slots_per_page)]
    latents = (torch.randn(len(slots), 512) * torch.logspace(-3, 2, len(slots))[:, None]).bfloat16()
    ours.store(slots, latents)
    k_cache.set_k_and_s_torch(theirs, slots, packed(k_cache, latents), slots_per_page)
    assert torch.equal(pages, theirs)
    read = k_cache.dequantize_k_cache_paged_ref(theirs, slots, slots_per_page)[:, 0]
    # Theirs is rounded to bf16; a power of two times e4m3 is exact in it.
    assert torch.equal(ours.load(slots), read.float())


def test_sinkhorn():
    from sglang.test.kernels.mhc import hc_split_sinkhorn_torch

    logits = torch.randn(64, 16) * 3
    mixes = torch.cat((torch.zeros(64, 8), logits), 1)[None]
    _, _, comb = hc_split_sinkhorn_torch(mixes, torch.ones(3), torch.zeros(24))
    found = sinkhorn(logits.view(64, 4, 4), 20, 1e-6)
    # 40 divisions in fp32 of values near 1, in another order.
    torch.testing.assert_close(found, comb[0], rtol=0, atol=1e-6)


def test_index_logits_over_pages():
    from sglang.test.kernels.paged_mqa import ref_fp8_paged_mqa_logits

    heads, entries = 5, [70, 1, 128, 64]
    pages = torch.zeros(12, index_page_bytes(), dtype=torch.uint8)
    cache = PackedIndexCache(pages)
    cache.store(torch.arange(12 * 64), torch.randn(12 * 64, 128))
    table = torch.randperm(12)[:8].view(4, 2)
    q = torch.randn(4, heads, 128).to(torch.float8_e4m3fn)
    weights = torch.randn(4, heads)
    keys = pages[:, : 64 * 128].view(torch.float8_e4m3fn).view(12, 64, 128)
    scales = pages[:, 64 * 128 :].contiguous().view(torch.float32).view(12, 64)
    expected = ref_fp8_paged_mqa_logits(
        q[:, None], keys, scales, weights, torch.tensor(entries), table, 128, 64
    )
    within = torch.arange(64)
    slots = (table[:, :, None] * 64 + within).flatten(1)
    plan = SimpleNamespace(
        request_slots=lambda ratio: slots,
        visible=lambda ratio: torch.tensor(entries),
        query=torch.zeros(4, dtype=torch.int64),
        request=torch.arange(4),
        max_queries=1,
        max_seq_len=512,
    )
    found = indexer_logits.reference(q, weights, cache, plan)
    # fp32 sums of 128 products and of the heads, in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def host_attention():
    from sglang.test.kits.attention_unittest.attention_methods import dsv4_attention

    yield dsv4_attention
    # Its import pins the parallel layout of this process.
    dsv4_attention._parallel_override.__exit__(None, None, None)


def _case_names():
    from sglang.test.kits.attention_unittest.attention_methods.dsv4_attention import make_dsv4_cases

    return make_dsv4_cases("dsv4")


class Adapter:
    """A case of the host's as slots of our caches, and as the fixture that its references read."""

    def __init__(self, host, case, compressed: int = 0):
        self.case, self.context = case, 512
        keys = [torch.randn(length, 512).bfloat16() for length in case.seq_lens]
        sink = torch.full((case.num_heads,), case.attn_sink_value)
        self.q = torch.randn(case.num_input_tokens, case.num_heads, 512).bfloat16()
        self.entries = torch.randn(max(compressed, 1), 512).bfloat16()
        self.window = torch.full((case.num_input_tokens, WINDOW), -1)
        row = 0
        for request, (prefix, count) in enumerate(zip(case.prefix_lens, case.input_lens)):
            for position in range(prefix, prefix + count):
                seen = torch.arange(max(0, position - WINDOW + 1), position + 1)
                self.window[row, : len(seen)] = seen + host._token_loc(
                    request, 0, max_context_len=self.context
                )
                row += 1
        self.compressed = torch.arange(compressed).expand(row, -1)
        self.window_cache = self._cache(case.batch_size * self.context + 1, 256)
        for request, latents in enumerate(keys):
            start = host._token_loc(request, 0, max_context_len=self.context)
            slots = torch.arange(len(latents)) + start
            self.window_cache.store(slots, latents)
            keys[request] = self.window_cache.load(slots).bfloat16()  # as rounded to FP8
        self.compressed_cache = self._cache(max(compressed, 1), 64)
        every = torch.arange(len(self.entries))
        self.compressed_cache.store(every, self.entries)
        self.entries = self.compressed_cache.load(every).bfloat16()
        self.sink = sink
        metadata = SimpleNamespace(
            swa_page_indices=self.window,
            swa_topk_lengths=(self.window >= 0).sum(1),
            sparse_page_indices=lambda ratio: self.compressed,
            sparse_topk_lengths=lambda ratio: torch.full((row,), compressed),
        )
        self.fixture = SimpleNamespace(
            case=SimpleNamespace(**vars(case) | {"compress_ratio": 128 if compressed else 0}),
            actual_module=SimpleNamespace(attn_sink=sink),
            backend=SimpleNamespace(
                init_forward_metadata=lambda batch: None,
                forward_metadata=SimpleNamespace(core_metadata=metadata),
            ),
            forward_batch=None,
            runner=SimpleNamespace(
                req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(1, self.context))
            ),
            _swa_bf16_k_per_req=keys,
            _extra_bf16_k=self.entries,
        )

    @staticmethod
    def _cache(slots: int, slots_per_page: int) -> PackedLatentCache:
        pages = torch.zeros(
            -(-slots // slots_per_page), latent_page_bytes(slots_per_page), dtype=torch.uint8
        )
        return PackedLatentCache(pages, slots_per_page)

    def ours(self) -> torch.Tensor:
        rows = self.q.shape[0]
        none = self.compressed.shape[1] == 0
        return sparse_mla.reference(
            self.q,
            self.window_cache,
            self.window,
            None if none else self.compressed_cache,
            None if none else self.compressed,
            self.sink,
            512**-0.5,
            torch.ones(rows, 32),  # no rotation: the host's reference has none
            torch.zeros(rows, 32),
        )


@pytest.mark.parametrize("case", _case_names(), ids=lambda case: case.name)
@pytest.mark.parametrize("compressed", [0, 32])
def test_attention(host_attention, case, compressed):
    adapter = Adapter(host_attention, case, compressed)
    if compressed:
        expected = host_attention._pure_torch_dsv4_combined_reference(adapter.fixture, adapter.q)
    else:
        expected = host_attention._pure_torch_dsv4_swa_reference(
            adapter.fixture, adapter.q, None, case=case
        )
    # Both round to bf16, ours twice: before and after the rotation, which is none here.
    torch.testing.assert_close(adapter.ours().float(), expected.float(), atol=1e-2, rtol=1e-2)
