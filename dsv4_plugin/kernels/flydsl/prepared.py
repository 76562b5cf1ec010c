"""The order in which the FlyDSL kernels read experts: each load of a wave is one contiguous KiB
that lies as `v_mfma_scale_f32_16x16x128_f8f6f4` takes it, so no byte goes through local memory.

A lane of the instruction, with g = lane // 16 and r = lane % 16, holds of row r, in FP4, the 32
consecutive columns from 32 g on, and the scale of those:

    data    [16 rows][128 columns][lane][16 bytes]
    scales  [64 rows][128 columns][lane][byte t]: of row 16 t + r, columns 32 g .. 32 g + 31

and in FP8 the 16 columns from 16 g on and those from 64 + 16 g on:

    data    [16 rows][128 columns][half][lane][16 bytes]
    scales  fp32, one for 128 rows and columns, as released; those of gate before those of up
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats import ue8m0_to_float

FP4_LAYOUT, FP8_LAYOUT = "fp4 by lanes of 16x16x128", "fp8 by lanes of 16x16x128"
GATE_UP, DOWN = "gate and up by turns of 16 rows", "down"


class LayoutError(ValueError):
    """Weights that are not in the order a kernel reads."""


@dataclass(frozen=True)
class PreparedExperts:
    """FP4 or FP8 matrices [E, rows, columns] in the order of `layout`; `kind` says what they
    are."""

    data: Tensor
    """uint8 [E, rows, columns / 2] of FP4, [E, rows, columns] of FP8"""
    scales: Tensor
    """uint8 [E, rows, columns / 32] of FP4, fp32 [E, rows / 128, columns / 128] of FP8"""
    kind: str
    layout: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, rows, columns) of the matrices."""
        count, rows, width = self.data.shape
        return count, rows, 2 * width if self.layout == FP4_LAYOUT else width

    def require(self, kind: str, *layouts: str) -> None:
        """Raises LayoutError unless these are weights of `kind` in one of `layouts`."""
        if self.kind != kind or self.layout not in layouts:
            raise LayoutError(
                f"weights are {self.kind!r} in the order {self.layout!r}, the kernel reads {kind!r}"
                f" in {' or '.join(map(repr, layouts))}; prepare them from released ones"
            )


def prepare(
    w1: Tensor,
    w1_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    w3: Tensor,
    w3_scale: Tensor | None,
) -> tuple[PreparedExperts, None, PreparedExperts, None, PreparedExperts, None]:
    """What the kernels take in the place of the same arguments of ops.moe: gate and up together,
    down, gate and up again; new tensors.

    Raises LayoutError for weights that are neither packed FP4 nor FP8, for shapes the order does
    not fit, and when what was prepared does not hold the released bytes.
    """
    if reason := lacks(w1, w2):
        raise LayoutError(reason)
    if w1.dtype == torch.float8_e4m3fn:
        scales = [_numbers(scale) for scale in (w1_scale, w3_scale, w2_scale)]
        up = PreparedExperts(
            _fp8_data(_by_turns(w1, w3)), torch.cat(scales[:2], 1), GATE_UP, FP8_LAYOUT
        )
        down = PreparedExperts(_fp8_data(_bytes(w2)), scales[2], DOWN, FP8_LAYOUT)
        return up, None, down, None, up, None
    gate_up = _by_turns(w1, w3), _by_turns(w1_scale, w3_scale)
    up, down = made = (
        PreparedExperts(_data(gate_up[0]), _scales(gate_up[1]), GATE_UP, FP4_LAYOUT),
        PreparedExperts(_data(_bytes(w2)), _scales(_bytes(w2_scale)), DOWN, FP4_LAYOUT),
    )
    for weights, (data, scales) in zip(made, (gate_up, (_bytes(w2), _bytes(w2_scale)))):
        _check_a_few(weights, data, scales)
    return up, None, down, None, up, None


def released(gate_up: PreparedExperts, down: PreparedExperts) -> tuple[Tensor, ...]:
    """w1, its scale, w2, w3 alike, as they were before `prepare`: new tensors; scales of FP8 are
    fp32."""
    if gate_up.layout == FP8_LAYOUT:
        both, w2 = (_released_fp8(each.data) for each in (gate_up, down))
        first, second = gate_up.scales.chunk(2, 1)
        return _half_of(both, 0), first, w2, down.scales, _half_of(both, 1), second
    parts = []
    for weights in (gate_up, down):
        count, n, half = weights.data.shape
        tiles = weights.data.view(count, n // 16, half // 64, 4, 16, 16)
        parts.append(tiles.permute(0, 1, 4, 2, 3, 5).reshape(count, n, half).view(torch.int8))
        blocks = weights.scales.shape[2]
        groups = weights.scales.view(count, n // 64, blocks // 4, 4, 16, 4)
        scales = groups.permute(0, 1, 5, 4, 2, 3).reshape(count, n, blocks)
        parts.append(scales.view(torch.float8_e8m0fnu))
    both, both_scales, w2, w2_scale = parts
    w1, w3 = _half_of(both, 0), _half_of(both, 1)
    return w1, _half_of(both_scales, 0), w2, w2_scale, w3, _half_of(both_scales, 1)


def _half_of(turns: Tensor, which: int) -> Tensor:
    """Gate (0) or up (1) of both by turns."""
    pairs = turns.view(torch.uint8).unflatten(1, (-1, 2, 16))
    return pairs[:, :, which].flatten(1, 2).view(turns.dtype)


def lacks(w1: Tensor, w2: Tensor) -> str | None:
    """Why experts of these shapes, released FP4 [E, I, d/2] and [E, d, I/2] or FP8 [E, I, d] and
    [E, d, I], do not fit the order, or None."""
    if w1.dtype not in (torch.int8, torch.float8_e4m3fn):
        return f"the experts are {str(w1.dtype).removeprefix('torch.')}, neither packed FP4 nor FP8"
    inner, wide = w1.shape[1], w2.shape[1]
    if inner % 128:
        return f"the intermediate size {inner} is no multiple of 128"
    return f"the hidden size {wide} is no multiple of 128" if wide % 128 else None


def _bytes(packed: Tensor) -> Tensor:
    return packed.view(torch.uint8)


def _by_turns(gate: Tensor, up: Tensor) -> Tensor:
    """Bytes [E, 2 n, c] of two [E, n, c], 16 rows of one and 16 of the other by turns."""
    tiles = [_bytes(each).unflatten(1, (-1, 16)) for each in (gate, up)]
    return torch.stack(tiles, 2).flatten(1, 3)


def _numbers(scale: Tensor) -> Tensor:
    """fp32 scales of ue8m0 or fp32 ones."""
    return scale if scale.dtype == torch.float32 else ue8m0_to_float(scale)


def _fp8_data(rows: Tensor) -> Tensor:
    """Bytes [E, n, K] of FP8 in the order of the module's docstring, in the same shape."""
    tiles = rows.unflatten(2, (-1, 2, 4, 16)).unflatten(1, (-1, 16))  # E, tile, r, step, half, g
    return tiles.permute(0, 1, 3, 4, 5, 2, 6).reshape(rows.shape)


def _released_fp8(data: Tensor) -> Tensor:
    """FP8 [E, n, K] of bytes in that order."""
    count, rows, columns = data.shape
    tiles = data.view(count, rows // 16, columns // 128, 2, 4, 16, 16)
    return tiles.permute(0, 1, 5, 2, 3, 4, 6).reshape(data.shape).view(torch.float8_e4m3fn)


def _data(rows: Tensor) -> Tensor:
    """Bytes [E, n, K/2] in the order of the module's docstring, in the same shape."""
    tiles = rows.unflatten(2, (-1, 4, 16)).unflatten(1, (-1, 16))  # E, tile, r, step, g, byte
    return tiles.permute(0, 1, 3, 4, 2, 5).reshape(rows.shape)


def _scales(rows: Tensor) -> Tensor:
    """The same of scales [E, n, K/32]."""
    tiles = rows.unflatten(2, (-1, 4)).unflatten(1, (-1, 4, 16))  # E, group, t, r, step, g
    return tiles.permute(0, 1, 4, 5, 3, 2).reshape(rows.shape)


def _check_a_few(weights: PreparedExperts, data: Tensor, scales: Tensor) -> None:
    """Some lanes of the first and last expert against what was released."""
    if weights.data.is_meta:  # shapes alone
        return
    count, rows, columns = weights.shape
    steps = columns // 128
    for expert in {0, count - 1} - {-1}:
        codes = weights.data[expert].view(-1, steps, 64, 16)
        factors = weights.scales[expert].view(-1, steps, 64, 4)
        for row, step, g in ((0, 0, 0), (rows - 1, steps - 1, 3), (rows // 2 + 5, steps // 2, 2)):
            lane, start = 16 * g + row % 16, 128 * step + 32 * g
            same = codes[row // 16, step, lane].equal(
                data[expert, row, start // 2 : start // 2 + 16]
            ) and factors[row // 64, step, lane, row // 16 % 4].equal(
                scales[expert, row, start // 32]
            )
            if not same:
                raise LayoutError(f"row {row} of expert {expert} was not prepared as released")
