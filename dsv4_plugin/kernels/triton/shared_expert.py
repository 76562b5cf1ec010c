"""The shared expert in three launches: rows rounded to FP8 where the form does so, w1 and w3 in one
pass with clamp and SiLU, and w2.

The kernels are those of moe (expert_kernels.py) with all rows in one expert. Its matrices are a few
megabytes a rank, so a decode step cuts them into columns as narrow as a product allows. Byte floor:
the three matrices once, 2·d a token read, 4·d written. 6·d·I operations a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import device
from .experts import AMD, WIDE, Tile, Tiles, both_products, form_of

TILES: tuple[tuple[str, int, Tiles], ...] = (
    ("gfx950", 16, Tiles(16, Tile(16, 128, 1, 3, AMD), Tile(64, 128, 4, 2, AMD))),
    ("gfx950", 256, Tiles(64, Tile(32, 128, 4, 3, AMD), Tile(64, 128, 4, 2, AMD))),
    ("gfx950", 1 << 62, WIDE),
    ("gfx", 16, Tiles(16, Tile(32, 128, 2, 2, AMD), Tile(64, 128, 4, 1, AMD))),
    ("gfx", 1 << 62, Tiles(64, Tile(64, 128, 4, 2, AMD), Tile(128, 128, 4, 2, AMD))),
    # 64 rows at any size: fewer are not multiplied as FP8.
    ("sm_", 256, Tiles(64, Tile(16, 128, 4, 3), Tile(64, 128, 4, 3))),
    ("sm_", 1 << 62, Tiles(64, Tile(128, 128, 8, 4), Tile(128, 128, 4, 3))),
    ("cpu", 1 << 62, Tiles(64, Tile(128, 128, 1, 1), Tile(512, 128, 1, 1))),  # interpreted
)
"""(architecture prefix, most rows, tiles); the first row that fits is taken."""


def tiles_of(rows: int) -> Tiles:
    """Tiles of a step of `rows`."""
    arch = device.arch()
    return next(tiles for name, most, tiles in TILES if arch.startswith(name) and rows <= most)


def shared_expert(
    x: Tensor,
    w1: Tensor,
    w1_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    w3: Tensor,
    w3_scale: Tensor | None,
    swiglu_limit: float,
) -> Tensor:
    """The operator of the same name for bf16 `x` and weights as released, or dense bf16."""
    if not x.shape[0]:
        return torch.empty(x.shape, dtype=torch.float32, device=x.device)
    matrices = (
        part if part is None else part.unsqueeze(0)
        for part in (w1, w1_scale, w2, w2_scale, w3, w3_scale)
    )
    form = form_of(w1, w1_scale)
    return both_products(x, *matrices, swiglu_limit, form, tiles_of(x.shape[0]))
