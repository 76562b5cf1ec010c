"""Kernels of others for the same operators, where they are installed: never needed, always named
when missing.

A peer is given the tensors of the same call. Where its format or its task is not the same, its note
says what a ratio to it compares.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from floors import INDEX_BYTES, LATENT_BYTES
from kernel_cases import Call
from torch import Tensor

from dsv4_plugin import device
from dsv4_plugin.cache.layout import INDEX_PAGE_ENTRIES
from dsv4_plugin.cache.stores import PackedLatentCache
from dsv4_plugin.ops.rope import apply_rope

# bytes of bf16 latents laid out for a peer that cannot read the paged cache
_MOST_GATHERED = 1 << 34


@dataclass(frozen=True)
class Peer:
    """One call of somebody else's kernel."""

    name: str
    run: Callable[[], Any]
    rows: Callable[[Any, Tensor], Tensor]
    """What its result says of some rows, as `want` has it."""
    want: Callable[[Any, Tensor], Tensor]
    """The same of our reference's result on these rows."""
    note: str
    """What a ratio to it compares."""


@dataclass(frozen=True)
class Absent:
    """A peer that does not run here, and why."""

    name: str
    reason: str


def peers(call: Call, decode: bool) -> Iterator[Peer | Absent]:
    """The peers of a call; one that is not installed or cannot run it says why."""
    for name, make in _PEERS.get(call.operator.name, {}).items():
        try:
            yield make(call, decode)
        except _Unable as reason:
            yield Absent(name, str(reason))
        # whatever a foreign package does when it is loaded or called in vain
        except Exception as failure:
            yield Absent(
                name, f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
            )


class _Unable(Exception):
    """Why a peer cannot run a call."""


def _package(name: str) -> Any:
    if not device.arch().startswith(("sm_90", "sm_10")):
        raise _Unable(f"{name} has kernels for sm_90 and sm_100, this is {device.arch()}")
    try:
        return importlib.import_module(name)
    except ImportError as failure:
        raise _Unable(f"not installed ({failure})") from None


def _padded_heads(heads: int) -> int:
    if heads > 128 or 64 < heads < 128:
        raise _Unable(f"takes 64 or 128 heads, not {heads}")
    return 64 if heads <= 64 else 128


def _wide(lists: Tensor, multiple: int) -> Tensor:
    """int32 lists [T, 1, n] padded with -1 to a multiple of slots."""
    return F.pad(lists, (0, -lists.shape[-1] % multiple), value=-1).to(torch.int32).unsqueeze(1)


def _as_flash_mla(cache: PackedLatentCache) -> Tensor:
    """Pages [n, slots, 1, 584] of the same memory, in the format that FlashMLA calls V4."""
    slots = cache.slots_per_page
    return cache.pages[:, : slots * LATENT_BYTES].view(-1, slots, 1, LATENT_BYTES)


def _flash_mla(call: Call, decode: bool) -> Peer:
    flash_mla = _package("flash_mla")
    q, window_cache, window, cache, slots, sink, scale, cos, sin = call.arguments
    heads, padded = q.shape[1], _padded_heads(q.shape[1])
    more = padded - heads
    q, sink = F.pad(q, (0, 0, 0, more)), F.pad(sink, (0, more))
    apart = "; it leaves the output's inverse RoPE to the check, out of its time"
    if more:
        apart += f"; on {padded} heads, {more} of them zeros, as the host calls it"

    def rows_of(out: Tensor, rows: Tensor) -> Tensor:
        return apply_rope(out[rows, :heads], cos[rows], sin[rows], inverse=True)

    if decode:
        meta, _ = flash_mla.get_mla_metadata()
        arguments = dict(
            q=q.unsqueeze(1),
            k_cache=_as_flash_mla(window_cache),
            block_table=None,
            cache_seqlens=None,
            head_dim_v=512,
            tile_scheduler_metadata=meta,
            softmax_scale=scale,
            is_fp8_kvcache=True,
            indices=_wide(window, 64),
            attn_sink=sink,
            extra_k_cache=_as_flash_mla(cache),
            extra_indices_in_kvcache=_wide(slots, 64),
            use_legacy=True,
        )
        return Peer(
            "flash_mla",
            lambda: flash_mla.flash_mla_with_kvcache(**arguments)[0][:, 0],
            rows_of,
            lambda want, rows: want,
            f"the same pages and slots, its schedule reused{apart}",
        )
    latents, lists = [], []
    for each, store in ((window, window_cache), (slots, cache)):
        distinct, place = each.unique(return_inverse=True)
        lists.append((place + sum(map(len, latents))).masked_fill(each < 0, -1))
        latents.append(store.load(distinct).to(torch.bfloat16))
    kv = torch.cat(latents).unsqueeze(1)
    if kv.numel() * 2 > _MOST_GATHERED:
        raise _Unable("its bf16 latents would not fit")
    # In a row what is absent comes first in the window and last among entries: both are -1, which
    # it skips.
    indices = _wide(torch.cat(lists, 1), 128)
    return Peer(
        "flash_mla",
        lambda: flash_mla.flash_mla_sparse_fwd(q, kv, indices, scale, 512, sink, use_legacy=True)[
            0
        ],
        rows_of,
        lambda want, rows: want,
        f"latents already dequantised to bf16, 1024 B each; making them is not in its time{apart}",
    )


def _deep_gemm(call: Call, decode: bool) -> Peer:
    deep_gemm = _package("deep_gemm")
    q, weights, cache, plan = call.arguments
    entries = plan.max_seq_len // 4
    context = plan.visible(4).to(torch.int32).clamp_min(1).unsqueeze(-1)
    table = plan.page_table[plan.request].to(torch.int32)
    keys = cache.pages.view(-1, INDEX_PAGE_ENTRIES, 1, INDEX_BYTES)
    units = torch.cuda.get_device_properties(q.device).multi_processor_count
    schedule = deep_gemm.get_paged_mqa_logits_metadata(context, INDEX_PAGE_ENTRIES, units)

    def run():
        return deep_gemm.fp8_paged_mqa_logits(
            q.unsqueeze(1), keys, weights, context, table, schedule, entries, False
        )

    def hidden(rows):
        return torch.arange(entries, device=q.device) >= plan.visible(4)[rows].unsqueeze(-1)

    return Peer(
        "deep_gemm",
        run,
        lambda out, rows: out[rows, :entries].masked_fill(hidden(rows), float("-inf")),
        lambda want, rows: want,
        "the same pages, its schedule reused"
        + ("" if decode else "; every row a request of its own, as the host calls it"),
    )


def _torch_topk(call: Call, decode: bool) -> Peer:
    logits, visible, topk = call.arguments
    topk = min(topk, logits.shape[1])

    def values(numbers: Tensor, rows: Tensor) -> Tensor:
        found = logits[rows].gather(1, numbers.clamp_min(0)).masked_fill(numbers < 0, float("-inf"))
        return found.sort(-1).values

    return Peer(
        "torch.topk",
        lambda: torch.topk(logits, topk, sorted=False).indices,
        lambda numbers, rows: values(numbers[rows], rows),
        values,
        "selects over all columns, hidden ones set to -inf before; in no order, ties as they come",
    )


_PEERS: dict[str, dict[str, Callable[[Call, bool], Peer]]] = {
    "sparse_mla": {"flash_mla": _flash_mla},
    "indexer_logits": {"deep_gemm": _deep_gemm},
    "topk_select": {"torch.topk": _torch_topk},
}
