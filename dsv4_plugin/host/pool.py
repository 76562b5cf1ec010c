"""The host's DeepSeek-V4 pool as our caches (docs/model.md §4).

In `serving` precision the stores write the pool's own pages, byte for byte as its layout "v4" asks.
In `exact` and `official` they are fp32 buffers beside the pool, addressed by the pool's own slots:
the scheduler, the radix cache and eviction act on them alike, the pool's pages stay unused. The
compressor rings are the pool's in every precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sglang.kernels.ops.attention.dsv4.kv_layout import KVLayout
from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
from torch import Tensor

from ..cache import (
    INDEX_PAGE_ENTRIES,
    PAGE_TOKENS,
    Caches,
    DenseIndexCache,
    DenseLatentCache,
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from ..cache.stores import SlotStore
from ..config import Precision


class PoolError(RuntimeError):
    """The host built a KV pool of another kind or layout than this package reads."""


def pool_caches(
    pool: DeepSeekV4TokenToKVPool,
    compress_ratios: Sequence[int],
    precision: Precision,
    first: int = 0,
) -> Caches:
    """Caches over `pool` for layers `first`.. of the given compress ratios: those of a stage of a
    pipeline or of a draft. Raises PoolError for a layout not known here."""
    check_layout(pool)
    caches = Caches()
    for layer, ratio in enumerate(compress_ratios, first):
        pages = pool.swa_kv_pool.kv_buffer[layer - first]
        caches.window[layer] = _latents(pages, PAGE_TOKENS, precision)
        if not ratio:
            continue
        _, position, compressed = pool.layer_mapping[layer]
        caches.compressed[layer] = _latents(
            compressed.kv_buffer[position], entries_per_page(ratio), precision
        )
        caches.ring[layer] = _ring(pool.compress_state_pools[layer])
        if ratio == 4:
            caches.index[layer] = _index_keys(
                pool.c4_indexer_kv_pool.index_k_with_scale_buffer[position], precision
            )
            caches.index_ring[layer] = _ring(pool.indexer_compress_state_pools[layer])
    return caches


def ring_rows(pool: DeepSeekV4TokenToKVPool, compress_ratios: Sequence[int]) -> dict[int, int]:
    """Rows of a compressor ring for each ratio other than 0 among `compress_ratios`; speculation
    doubles them."""
    return {ratio: pool.get_ring_size(ratio) for ratio in sorted(set(compress_ratios) - {0})}


def check_layout(pool: object) -> None:
    """Raises PoolError unless `pool` is the host's DeepSeek-V4 pool in layout "v4" with paged
    windows."""
    if not isinstance(pool, DeepSeekV4TokenToKVPool):
        raise PoolError(f"the host built a {type(pool).__name__}, not its DeepSeek-V4 KV pool")
    for what, found, way_out in (
        (
            "kv layout",
            pool.kv_layout is not KVLayout.V4 and pool.kv_layout,
            "unset SGLANG_DSV4_KV_LAYOUT",
        ),
        ("unified KV pool", pool.unified_kv_pool is not None, "unset SGLANG_HACK_FLASHMLA_BACKEND"),
        ("uniform FP8 pool", pool.uniform_fp8, "leave --dsv4-attn-backend at auto"),
        (
            "request windows",
            pool.request_window is not None,
            "disable the encoder's bounded replay",
        ),
        (
            "online compression",
            any(state is not None and state.online for state in pool.compress_state_pools),
            "unset SGLANG_OPT_USE_ONLINE_COMPRESS",
        ),
    ):
        if found:
            raise PoolError(
                f"the host's KV pool uses {what} ({found}), which this package does not read;"
                f" {way_out}"
            )


def _latents(pages: Tensor, slots_per_page: int, precision: Precision) -> SlotStore:
    if pages.dtype != torch.uint8 or pages.shape[1] != latent_page_bytes(slots_per_page):
        raise PoolError(
            f"a page of {slots_per_page} latents is {pages.dtype} {list(pages.shape[1:])} in the"
            f" host's pool, not {latent_page_bytes(slots_per_page)} bytes"
        )
    if precision is Precision.SERVING:
        return PackedLatentCache(pages, slots_per_page)
    return DenseLatentCache(
        pages.shape[0] * slots_per_page, precision is Precision.OFFICIAL, pages.device
    )


def _index_keys(pages: Tensor, precision: Precision) -> SlotStore:
    if pages.dtype != torch.uint8 or pages.shape[1] != index_page_bytes():
        raise PoolError(
            f"a page of index keys is {pages.dtype} {list(pages.shape[1:])} in the host's pool, "
            f"not {index_page_bytes()} bytes; leave the indexer's cache at FP8"
        )
    if precision is Precision.SERVING:
        return PackedIndexCache(pages)
    return DenseIndexCache(
        pages.shape[0] * INDEX_PAGE_ENTRIES, precision is Precision.OFFICIAL, pages.device
    )


def _ring(state) -> Tensor:
    ring = state.kv_score_buffer.kv_score
    if ring.dtype != torch.float32:
        raise PoolError(
            f"the host keeps compressor state as {ring.dtype}; unset"
            " SGLANG_DSV4_COMPRESS_STATE_DTYPE"
        )
    return ring
