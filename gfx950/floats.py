"""Float formats that numpy lacks (bf16, the 8-, 6- and 4-bit formats) and an fma with one rounding.

Values and rounding are those of OCP's "8-bit Floating Point" and "Microscaling Formats".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

F32, U32 = np.float32, np.uint32


@dataclass(frozen=True)
class Format:
    """Sign, `exponent` and `mantissa` bits. `nan` is its code without sign (None: it has none),
    `infinity` likewise; a format with `only_zero` has one zero and its NaN in the other's place."""

    exponent: int
    mantissa: int
    bias: int
    nan: int | None
    infinity: int | None = None
    only_zero: bool = False

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def largest(self) -> int:
        """Code of the largest finite value."""
        top = (1 << (self.bits - 1)) - 1
        if self.infinity is not None:
            return self.infinity - 1
        return top - (self.nan == top)

    @cached_property
    def values(self) -> np.ndarray:
        """float32 of every code."""
        code = np.arange(1 << self.bits)
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        field, low = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        one = 1 << self.mantissa
        value = np.where(field > 0, low + one, low) * np.exp2(
            np.maximum(field, 1) - self.bias - self.mantissa
        )
        if self.infinity is not None:
            value = np.where(magnitude == self.infinity, np.inf, value)
            value = np.where(magnitude > self.infinity, np.nan, value)
        elif self.nan is not None and not self.only_zero:
            value = np.where(magnitude == self.nan, np.nan, value)
        value = np.where(code >> (self.bits - 1), -value, value).astype(F32)
        if self.only_zero:
            value[1 << (self.bits - 1)] = np.nan
        return value

    def encode(self, x: np.ndarray, saturate: bool) -> np.ndarray:
        """uint32 codes of `x`, to nearest even. What is too large becomes the largest value or,
        unless `saturate`, infinity, or NaN where there is none, or the largest without either."""
        x = np.asarray(x)
        negative, size = np.signbit(x), np.abs(x.astype(np.float64))
        finite = np.where(np.isfinite(size), size, 0.0)
        power = np.where(
            finite > 0, np.maximum(np.frexp(finite)[1] - 1, 1 - self.bias), 1 - self.bias
        )
        code = np.rint(np.ldexp(finite, self.mantissa - power)).astype(np.int64)
        code += (power + self.bias - 1).astype(np.int64) << self.mantissa
        sign = 1 << (self.bits - 1)
        nan = sign if self.only_zero else self.largest if self.nan is None else self.nan
        over = nan if self.infinity is None else self.infinity
        code = np.where(
            (code > self.largest) | np.isinf(size),
            self.largest if saturate or self.nan is None else over,
            code,
        )
        code = np.where(np.isnan(size), nan, code)
        if self.only_zero:
            negative = negative & (code != 0) & (code != nan)
        return (code | np.where(negative, sign, 0)).astype(U32)


E4M3 = Format(4, 3, 7, nan=0x7F)
E5M2 = Format(5, 2, 15, nan=0x7F, infinity=0x7C)
E4M3FNUZ = Format(4, 3, 8, nan=0x80, only_zero=True)
E5M2FNUZ = Format(5, 2, 16, nan=0x80, only_zero=True)
E2M3 = Format(2, 3, 1, nan=None)
E3M2 = Format(3, 2, 3, nan=None)
E2M1 = Format(2, 1, 1, nan=None)


def formats(arch: str) -> dict[str, Format]:
    """The small formats by their names in instructions: gfx942 has the 8-bit ones without infinity
    and negative zero."""
    eight = (E4M3FNUZ, E5M2FNUZ) if arch == "gfx942" else (E4M3, E5M2)
    return {"fp8": eight[0], "bf8": eight[1], "fp4": E2M1}


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of bf16 in the low half of `bits`."""
    return (bits.astype(U32) << 16).view(F32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """bf16 bits as uint32 of float32, to nearest even; NaN stays NaN and becomes quiet."""
    bits = np.ascontiguousarray(x, dtype=F32).view(U32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c in float32, rounded once.

    The product is exact in float64, and so is the sum's error term. Only a sum in the middle of
    two float32 (or among subnormals) can be rounded wrongly twice, so only that is mended.
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    bits = total.view(np.int64)
    if not (((bits & 0x1FFFFFFF) == 0x10000000) | (np.abs(total) < 2.0**-125)).any():
        return total.astype(F32)
    back = total - product
    error = (product - (total - back)) + (c - back)
    inexact = (error != 0) & np.isfinite(total)
    toward_zero = bits - (inexact & ((error < 0) != (total < 0)))
    return np.where(inexact, toward_zero | 1, bits).view(np.float64).astype(F32)


def flush(x: np.ndarray) -> np.ndarray:
    """float32 with subnormals as zeros, as the transcendental unit takes and gives them."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)
