"""Where cached latents and index keys live: packed pages as kernels read them, or dense fp32 for
checking.

Slot 0 belongs to nobody: a store to a negative slot lands there, a load of one reads it, so that
shapes stay static and the caller masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..formats import (
    dequantize_fp8,
    quantize_fp8,
    round_to_fp4,
    round_to_fp8,
    ue8m0_bytes,
    ue8m0_to_float,
)
from .layout import (
    INDEX_DIM,
    LATENT_DIM,
    NOPE_DIM,
    SCALE_BLOCK,
    index_row_numbers,
    index_rows,
    latent_row_numbers,
    latent_rows,
)


class SlotStore(Protocol):
    """Vectors by slot number (int64)."""

    def store(self, slots: Tensor, values: Tensor) -> None:
        """Writes `values` [n, dim] at `slots` [n]."""

    def load(self, slots: Tensor) -> Tensor:
        """fp32 [n, dim] at `slots` [n]."""


class PackedLatentCache:
    """Latents in uint8 `pages` [n, page_bytes] of `slots_per_page` slots: nope as FP8 in blocks of
    64, rope as bf16."""

    def __init__(self, pages: Tensor, slots_per_page: int):
        self.pages = pages
        self.slots_per_page = slots_per_page
        self._data, self._scales = latent_rows(pages)

    def store(self, slots: Tensor, values: Tensor) -> None:
        row, scale_row = latent_row_numbers(slots.clamp_min(0), self.slots_per_page)
        nope, scale = quantize_fp8(values[..., :NOPE_DIM], SCALE_BLOCK)
        rope = values[..., NOPE_DIM:].to(torch.bfloat16).contiguous()
        data = torch.cat((nope.view(torch.uint8), rope.view(torch.uint8)), -1)
        self._data[row] = data.view(torch.int64)
        self._scales[scale_row] = ue8m0_bytes(scale)

    def load(self, slots: Tensor) -> Tensor:
        row, scale_row = latent_row_numbers(slots.clamp_min(0), self.slots_per_page)
        data = self._data.index_select(0, row).view(torch.uint8)
        scale = ue8m0_to_float(self._scales.index_select(0, scale_row))
        nope = dequantize_fp8(data[:, :NOPE_DIM].view(torch.float8_e4m3fn), scale)
        return torch.cat((nope, data[:, NOPE_DIM:].view(torch.bfloat16)), -1)


class PackedIndexCache:
    """Index keys in uint8 `pages` [n, 8448]: 64 keys of 128 e4m3, then their fp32 scales."""

    def __init__(self, pages: Tensor):
        self.pages = pages
        self._keys, self._scales = index_rows(pages)

    def store(self, slots: Tensor, values: Tensor) -> None:
        row, scale_row = index_row_numbers(slots.clamp_min(0))
        keys, scale = quantize_fp8(values, INDEX_DIM)
        self._keys[row] = keys.view(torch.uint8)
        self._scales[scale_row] = scale

    def load(self, slots: Tensor) -> Tensor:
        row, scale_row = index_row_numbers(slots.clamp_min(0))
        keys, scale = self._keys.index_select(0, row), self._scales.index_select(0, scale_row)
        return dequantize_fp8(keys.view(torch.float8_e4m3fn), scale)


class DenseLatentCache:
    """Latents as fp32 [slots, 512]; with `rounded`, through FP8 on the nope part as the model was
    trained."""

    def __init__(self, slots: int, rounded: bool, device: torch.device | str = "cpu"):
        self.values = torch.zeros(slots, LATENT_DIM, device=device)
        self.rounded = rounded

    def store(self, slots: Tensor, values: Tensor) -> None:
        values = values.float()
        if self.rounded:
            values = torch.cat(
                (round_to_fp8(values[..., :NOPE_DIM], SCALE_BLOCK), values[..., NOPE_DIM:]), -1
            )
        self.values[slots.clamp_min(0)] = values

    def load(self, slots: Tensor) -> Tensor:
        return self.values.index_select(0, slots.clamp_min(0))


class DenseIndexCache:
    """Index keys as fp32 [slots, 128]; with `rounded`, through FP4 in blocks of 32 as the model was
    trained."""

    def __init__(self, slots: int, rounded: bool, device: torch.device | str = "cpu"):
        self.values = torch.zeros(slots, INDEX_DIM, device=device)
        self.rounded = rounded

    def store(self, slots: Tensor, values: Tensor) -> None:
        values = values.float()
        self.values[slots.clamp_min(0)] = round_to_fp4(values) if self.rounded else values

    def load(self, slots: Tensor) -> Tensor:
        return self.values.index_select(0, slots.clamp_min(0))


def _at_once(layer: int) -> None:
    """Nothing is on its way."""


@dataclass
class Caches:
    """Stores of a model by layer number; layers without a part have no key. Rings hold fp32 rows [k
    | score]."""

    window: dict[int, SlotStore] = field(default_factory=dict)
    compressed: dict[int, SlotStore] = field(default_factory=dict)
    index: dict[int, SlotStore] = field(default_factory=dict)
    ring: dict[int, Tensor] = field(default_factory=dict)
    index_ring: dict[int, Tensor] = field(default_factory=dict)
    wait: Callable[[int], None] = _at_once
    """Called with a layer's number before a step first touches its stores. Pages that come from
    another memory may still be on their way, a layer at a time."""
