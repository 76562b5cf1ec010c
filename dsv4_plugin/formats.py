"""Number formats of DeepSeek-V4: FP8 e4m3, FP4 e2m1 and their power-of-two (ue8m0) block scales.

Plain torch, the definition of every rounding the package makes (docs/model.md §2, §6). Rounding is
to nearest even and saturating.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

FP8_MAX = 448.0
FP4_MAX = 6.0
ACTIVATION_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6.0 * 2.0**-126
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of each e2m1 code 0..7; bit 3 of a code is the sign."""


def ue8m0_to_float(scale: Tensor) -> Tensor:
    """2^(b-127) of ue8m0 bytes (uint8 or float8_e8m0fnu), as fp32. Byte 0 is 2^-127, a denormal."""
    return scale.view(torch.float8_e8m0fnu).float()


def ue8m0_bytes(scale: Tensor) -> Tensor:
    """The ue8m0 byte (uint8) of each fp32 power of two in [2^-126, 2^127]: its biased exponent."""
    return (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def _power_of_two_at_least(x: Tensor) -> Tensor:
    """2^ceil(log2 x) for positive normal fp32 x, exactly."""
    bits = x.contiguous().view(torch.int32)
    # any mantissa but 0 carries into the exponent
    return ((bits + 0x7FFFFF) & -0x800000).view(torch.float32)


@functools.cache
@torch.inference_mode(False)  # tables are kept, also for those who will take gradients
def _e4m3_values() -> Tensor:
    """The value of each of the 256 e4m3 codes."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def e4m3_to_float(values: Tensor) -> Tensor:
    """fp32 of float8_e4m3fn `values`, exactly."""
    if values.device.type != "cpu":
        return values.float()
    # torch converts them one by one on a CPU: a look-up is 7 times as fast
    codes = values.view(torch.uint8).to(torch.int32)
    return _e4m3_values().index_select(0, codes.flatten()).view(codes.shape)


def _blocks(x: Tensor, block: int) -> Tensor:
    if x.shape[-1] % block:
        raise ValueError(f"last dimension {x.shape[-1]} is not a multiple of the block {block}")
    return x.float().unflatten(-1, (-1, block))


def quantize_fp8(
    x: Tensor, block: int, amax_floor: float = ACTIVATION_AMAX_FLOOR
) -> tuple[Tensor, Tensor]:
    """FP8 e4m3 of `x` [..., n] and its fp32 scales [..., n/block], powers of two:
    2^ceil(log2(max(amax, floor)/448))."""
    blocks = _blocks(x, block)
    amax = blocks.abs().amax(-1, keepdim=True).clamp_min(amax_floor)
    scale = _power_of_two_at_least(amax / FP8_MAX)
    values = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return values.flatten(-2), scale.squeeze(-1)


def dequantize_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """fp32 of e4m3 or fp32 `values` [..., n] with one scale per n / scale.shape[-1] elements."""
    values = e4m3_to_float(values) if values.dtype == torch.float8_e4m3fn else values
    return (values.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


def round_to_fp8(x: Tensor, block: int) -> Tensor:
    """`x` rounded through FP8 in blocks along the last dimension, in the dtype of `x`."""
    return dequantize_fp8(*quantize_fp8(x, block)).to(x.dtype)


def round_to_e2m1(x: Tensor) -> Tensor:
    """Each fp32 value of `x` rounded to the nearest e2m1 value, ties to the even mantissa,
    saturating at 6."""
    magnitude = x.abs().clamp(max=FP4_MAX)
    # The spacing of e2m1 is 0.5 below 2, then 1, then 2; round() is to nearest even within each.
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def quantize_fp4(
    x: Tensor, block: int = 32, amax_floor: float = FP4_AMAX_FLOOR
) -> tuple[Tensor, Tensor]:
    """FP4 of `x` [..., n]: e2m1 values as fp32 [..., n] and fp32 power-of-two scales [...,
    n/block]."""
    blocks = _blocks(x, block)
    amax = blocks.abs().amax(-1, keepdim=True).clamp_min(amax_floor)
    scale = _power_of_two_at_least(amax / FP4_MAX)
    return round_to_e2m1(blocks / scale).flatten(-2), scale.squeeze(-1)


def round_to_fp4(x: Tensor, block: int = 32) -> Tensor:
    """`x` rounded through FP4 in blocks along the last dimension, in the dtype of `x`."""
    return dequantize_fp8(*quantize_fp4(x, block)).to(x.dtype)


def pack_fp4(values: Tensor) -> Tensor:
    """int8 [..., n/2] of e2m1 `values` [..., n]: two codes a byte, the even column in the low
    nibble."""
    code = torch.bucketize(values.abs(), torch.tensor(FP4_VALUES, device=values.device))
    code = code | (torch.signbit(values).to(torch.int64) << 3)
    return (code[..., 0::2] | (code[..., 1::2] << 4)).to(torch.uint8).view(torch.int8)


@functools.cache
@torch.inference_mode(False)
def _fp4_pairs(device: torch.device) -> Tensor:
    """The two values of each byte, the low nibble's first: fp32 [256, 2]."""
    values = torch.tensor(FP4_VALUES + tuple(-v for v in FP4_VALUES), device=device)
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)


def unpack_fp4(packed: Tensor) -> Tensor:
    """fp32 [..., 2n] of packed e2m1 `packed` (int8 or uint8) [..., n]."""
    codes = packed.view(torch.uint8).to(torch.int32)
    pairs = _fp4_pairs(packed.device).index_select(0, codes.flatten())
    return pairs.view(*codes.shape[:-1], -1)


def dequantize_weight(
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] = (128, 128),
) -> Tensor:
    """A released weight [..., out, in] in `dtype` (docs/model.md §2).

    `weight` float8_e4m3fn [..., out, in] with `scale` [..., ceil(out/128), ceil(in/128)], or int8
    packed FP4 [..., out, in/2] with `scale` [..., out, in/32]; scales are ue8m0 (float8_e8m0fnu) or
    fp32.
    """
    factor = scale.float() if scale.dtype == torch.float32 else ue8m0_to_float(scale)
    if weight.dtype == torch.int8:
        return dequantize_fp8(unpack_fp4(weight), factor).to(dtype)
    rows, columns = weight.shape[-2:]
    factor = factor.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[
        ..., :columns
    ]
    return (e4m3_to_float(weight) * factor).to(dtype)


def dense_weight(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`weight` itself when it has no `scale`, that is when it is dense already; else decoded to
    `dtype`."""
    return weight if scale is None else dequantize_weight(weight, scale, dtype)


def quantize_weight_fp8(
    weight: Tensor, block: tuple[int, int] = (128, 128)
) -> tuple[Tensor, Tensor]:
    """FP8 e4m3 and ue8m0 scale [ceil(out/128), ceil(in/128)] of a weight [out, in], as released
    files store it."""
    rows, columns = weight.shape
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1])
    padded[:rows, :columns] = weight
    tiles = padded.unflatten(1, (grid[1], block[1])).unflatten(0, (grid[0], block[0]))
    scale = _power_of_two_at_least(
        tiles.abs().amax((1, 3), keepdim=True).clamp_min(ACTIVATION_AMAX_FLOOR) / FP8_MAX
    )
    values = (tiles / scale).flatten(2, 3).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn)
    return values.contiguous(), ue8m0_bytes(scale[:, 0, :, 0]).view(torch.float8_e8m0fnu)


def quantize_weight_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed FP4 int8 [out, in/2] and ue8m0 scale [out, in/32] of a weight [out, in], as released
    files store it."""
    values, scale = quantize_fp4(weight, 32, ACTIVATION_AMAX_FLOOR)
    return pack_fp4(values), ue8m0_bytes(scale).view(torch.float8_e8m0fnu)


@functools.cache
@torch.inference_mode(False)
def _hadamard_matrix(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


def hadamard(x: Tensor) -> Tensor:
    """Walsh–Hadamard transform of the last dimension n (a power of two), Sylvester order, scaled by
    n^-0.5, in fp32."""
    return x.float() @ _hadamard_matrix(x.shape[-1], x.device)
