"""Roundings of dsv4_plugin/formats.py as device functions: bf16, FP8 e4m3 and power-of-two scales.

The interpreter truncates fp32 to bf16 and gets some carries of fp32 to FP8 wrong, so there the same
rounding, to nearest even, is done on the bits; compiled code uses the hardware's conversions.
"""

import triton
import triton.language as tl

from ... import device

INTERPRETED = tl.constexpr(device.interprets_triton())
_AMAX_FLOOR = tl.constexpr(1e-4)


@triton.jit
def to_bf16(x):
    """bf16 of fp32 `x`."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(tl.bfloat16)


@triton.jit
def round_to_bf16(x):
    """fp32 `x` rounded to bf16, as fp32."""
    return to_bf16(x).to(tl.float32)


@triton.jit
def fp8_to_fp32(byte):
    """fp32 of finite e4m3 `byte` (uint8), on the bits, which costs the same on every architecture.

    e4m3's exponent and mantissa at the top of an fp32 magnitude are the value times 2^(7 - 127),
    subnormals included.
    """
    bits = byte.to(tl.int32)
    return (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(
        tl.float32, bitcast=True
    ) * 1.329227995784916e36


@triton.jit
def fp8_scale(amax):
    """(scale, 1 / scale, ue8m0 byte) of the power of two 2^ceil(log2(max(amax, 1e-4) / 448)), as
    quantize_fp8 has it.

    448 = 1.75 · 2^8, so amax = m · 2^e needs 2^(e-8), or one more when m > 1.75: no division, no
    logarithm.
    """
    bits = tl.maximum(amax, _AMAX_FLOOR).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, inverse, exponent.to(tl.uint8)


@triton.jit
def to_fp8_bytes(x):
    """e4m3 bytes (uint8) of fp32 `x` with |x| <= 448."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the spacing is 2^-9, which is the spacing of fp32 at 2^14.
        subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < (121 << 23), subnormal, normal)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


def is_fnuz() -> bool:
    """Whether the chip's matrix units take FP8 in the FNUZ format only."""
    return device.arch().startswith("gfx94")


@triton.jit
def fp8_operand(x, FNUZ: tl.constexpr):
    """e4m3 `x` as an operand; with FNUZ from its bytes, in the format of gfx942, where they mean
    half of the value.

    The one exception is the byte of -0, which is NaN there.
    """
    if FNUZ:
        return tl.where(x == 0x80, 0, x).to(tl.uint8).to(tl.float8e4b8, bitcast=True)
    else:
        return x
