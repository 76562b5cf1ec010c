"""Launches of the two products of an expert: which form the chip multiplies, in tiles of which
size."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from ... import device
from ..grouping import Groups
from ..strides import require_contiguous
from .expert_kernels import down_kernel, gate_up_kernel, quantise_rows_kernel

_GROUPS = 8  # blocks of 128 that a program quantises


@dataclass(frozen=True)
class Tile:
    """One product's tile and how it is compiled."""

    columns: int
    inputs: int
    """Of a pass over FP4 weights. FP8 takes 128, which one scale covers, and bf16 64."""
    warps: int
    stages: int
    options: dict[str, int] = field(default_factory=dict)
    """Compiler options."""


@dataclass(frozen=True)
class Tiles:
    """Rows of a block, and the tiles of both products."""

    rows: int
    gate_up: Tile
    down: Tile


# One instruction at every size: the order of a row's sums does not depend on the tile.
AMD = {"matrix_instr_nonkdim": 16}
_ANY = float("inf")
WIDE = Tiles(64, Tile(128, 128, 4, 2, AMD), Tile(128, 128, 4, 2, AMD))
TILES: tuple[tuple[str, str, float, Tiles], ...] = (
    # gfx950: two workgroups a compute unit or more, so that one's loads run under the other's
    # products; 32 columns where a step has few experts, to have programs for all compute units.
    ("gfx950", "", 1 / 16, Tiles(16, Tile(32, 256, 2, 3, AMD), Tile(64, 128, 4, 2, AMD))),
    ("gfx950", "", 12, Tiles(16, Tile(64, 256, 4, 2, AMD), Tile(128, 128, 4, 3, AMD))),
    ("gfx950", "", 48, WIDE),
    ("gfx950", "fp4", _ANY, Tiles(128, WIDE.gate_up, WIDE.down)),
    ("gfx950", "", _ANY, WIDE),
    ("gfx", "", 12, Tiles(16, Tile(64, 128, 4, 2, AMD), Tile(128, 128, 4, 1, AMD))),
    ("gfx", "", _ANY, Tiles(64, Tile(64, 64, 4, 2, AMD), Tile(128, 64, 4, 2, AMD))),
    ("sm_", "fp4", 1 / 16, Tiles(16, Tile(32, 128, 4, 3), Tile(128, 128, 4, 2))),
    ("sm_", "fp4", 12, Tiles(16, Tile(64, 128, 4, 3), Tile(128, 128, 4, 2))),
    # 64 rows at any size: fewer are not multiplied as FP8.
    ("sm_", "", _ANY, Tiles(64, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3))),
    ("cpu", "", _ANY, Tiles(64, Tile(128, 512, 1, 1), Tile(512, 128, 1, 1))),  # interpreted
)
"""(architecture prefix, weights or any, most rows an expert on average, tiles); the first row that
fits is taken."""

_ROUNDING = {
    "gfx950": ("fp4", "fp8"),
    "gfx94": ("fp8",),
    "sm_89": ("fp8",),
    "sm_9": ("fp8",),
    "sm_1": ("fp8",),
    "cpu": ("fp4", "fp8"),
}
"""By architecture prefix: weights that meet activations rounded to e4m3, because the matrix units
multiply them so. All others meet bf16 activations."""


@dataclass(frozen=True)
class Form:
    """How an expert's products are computed."""

    weights: str
    """ "fp4", "fp8" or "bf16", as they lie in memory."""
    rounded: bool
    """Whether activations are rounded to e4m3."""
    scale_bytes: bool
    """Whether scales are ue8m0 bytes, else fp32."""
    fnuz: bool
    """Whether the chip's e4m3 is FNUZ."""

    def block_k(self, tile: Tile, inputs: int) -> int:
        """Inputs of a pass over a matrix of `inputs`."""
        wanted = {"fp4": tile.inputs, "fp8": 128, "bf16": 64}[self.weights]
        return min(wanted, triton.next_power_of_2(inputs))


def form_of(weight: Tensor, scale: Tensor | None) -> Form:
    """The form for a weight and its scale on this process's chip."""
    weights = {torch.int8: "fp4", torch.float8_e4m3fn: "fp8"}.get(weight.dtype, "bf16")
    arch = device.arch()
    rounded = any(
        weights in kinds for prefix, kinds in _ROUNDING.items() if arch.startswith(prefix)
    )
    return Form(
        weights,
        rounded,
        scale is not None and scale.dtype != torch.float32,
        arch.startswith("gfx94"),
    )


def tiles_of(form: Form, rows: float) -> Tiles:
    """Tiles for experts of `rows` rows on average."""
    arch = device.arch()
    return next(
        tiles
        for name, weights, most, tiles in TILES
        if arch.startswith(name) and weights in ("", form.weights) and rows <= most
    )


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 bytes [T, d] and ue8m0 bytes [T, d/128] (both uint8) of bf16 `x` [T, d]."""
    rows, hidden = x.shape
    codes = torch.empty(rows, hidden, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, hidden // 128, dtype=torch.uint8, device=x.device)
    grid = (rows, triton.cdiv(hidden // 128, _GROUPS))
    quantise_rows_kernel[grid](x, codes, scales, HIDDEN=hidden, GROUPS=_GROUPS, num_warps=4)
    return codes, scales


def _bytes(tensor: Tensor | None) -> Tensor | None:
    """A packed weight or its ue8m0 scale as uint8, anything else as it is."""
    packed = tensor is not None and tensor.element_size() == 1
    return tensor.view(torch.uint8) if packed else tensor


def both_products(
    x: Tensor,
    w1: Tensor,
    w1_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    w3: Tensor,
    w3_scale: Tensor | None,
    swiglu_limit: float,
    form: Form,
    tiles: Tiles,
    topk: int = 1,
    groups: Groups | None = None,
    routing: Tensor | None = None,
) -> Tensor:
    """w2(swiglu(x w1ᵀ, x w3ᵀ) · weight) of every pair: bf16 [T · topk, d] for pairs in `groups`
    (others stay unwritten), fp32 [T, d] for one expert that takes every row of `x` bf16 [T, d].

    `w1`, `w3` [E, I, d] and `w2` [E, d, I], as ops.moe takes them; `routing` fp32 [T, topk].
    """
    rows, wide = x.shape
    inner, pairs = w1.shape[-2], rows * topk
    require_contiguous("moe" if groups else "shared_expert", x=x)
    scales = None
    if form.rounded:
        x, scales = quantise_rows(x)
    whole = form.rounded and tiles.gate_up.columns % 128 == 0
    hidden = torch.empty(
        pairs, inner, dtype=torch.uint8 if whole else torch.bfloat16, device=x.device
    )
    hidden_scales = None
    if whole:
        hidden_scales = torch.empty(
            pairs, triton.cdiv(inner, 128), dtype=torch.uint8, device=x.device
        )
    blocks = triton.cdiv(rows, tiles.rows) if groups is None else groups.experts.numel()
    held = (None, None) if groups is None else (groups.pairs, groups.experts)
    shared = {
        "WEIGHTS": form.weights,
        "ROUNDED": form.rounded,
        "SCALE_BYTES": form.scale_bytes,
        "FNUZ": form.fnuz,
        "GROUPED": groups is not None,
        "BLOCK_M": tiles.rows,
    }
    gate_up_kernel[(blocks, triton.cdiv(inner, tiles.gate_up.columns))](
        x,
        scales,
        *map(_bytes, (w1, w1_scale, w3, w3_scale)),
        *held,
        routing,
        hidden,
        hidden_scales,
        rows,
        swiglu_limit,
        w1.stride(0),
        0 if w1_scale is None else w1_scale.stride(0),
        IN=wide,
        OUT=inner,
        TOPK=topk,
        BLOCK_N=tiles.gate_up.columns,
        BLOCK_K=form.block_k(tiles.gate_up, wide),
        num_warps=tiles.gate_up.warps,
        num_stages=tiles.gate_up.stages,
        **shared,
        **tiles.gate_up.options,
    )
    out = torch.empty(
        pairs, wide, dtype=torch.float32 if groups is None else torch.bfloat16, device=x.device
    )
    round_here = form.rounded and not whole
    down_kernel[(blocks, triton.cdiv(wide, tiles.down.columns))](
        hidden,
        hidden_scales,
        *map(_bytes, (w2, w2_scale)),
        *held,
        out,
        rows,
        w2.stride(0),
        0 if w2_scale is None else w2_scale.stride(0),
        IN=inner,
        OUT=wide,
        ROUND_HERE=round_here,
        BLOCK_N=tiles.down.columns,
        BLOCK_K=128 if round_here else form.block_k(tiles.down, inner),
        num_warps=tiles.down.warps,
        num_stages=tiles.down.stages,
        **shared,
        **tiles.down.options,
    )
    return out
