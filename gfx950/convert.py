"""Conversions between numbers: integers, float32, float16, bf16, and the 8- and 4-bit formats with
and without a scale."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import floats
from .code_object import Kernel
from .operands import Kinds, Read, Run, sources, vector
from .program import Instruction
from .waves import F32, I64, U16, U32, Waves

F16 = np.float16


def _format(name: str, kernel: Kernel) -> floats.Format:
    return floats.formats(kernel.arch)[name]


def _to_integer(x: np.ndarray, dtype: type) -> np.ndarray:
    """Towards zero, into range; NaN is 0."""
    info, wide = np.iinfo(dtype), np.nan_to_num(x.astype(np.float64), nan=0.0)
    return np.clip(np.trunc(wide), info.min, info.max).astype(I64).astype(dtype)


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(F16).view(U16).astype(U32)


PLAIN_CONVERSIONS: dict[str, tuple[str, Callable]] = {
    "v_cvt_f32_i32": ("i", lambda a: a.astype(F32)),
    "v_cvt_f32_u32": ("u", lambda a: a.astype(F32)),
    "v_cvt_u32_f32": ("f", lambda a: _to_integer(a, U32)),
    "v_cvt_i32_f32": ("f", lambda a: _to_integer(a, np.int32)),
    "v_cvt_f32_f16": ("h", lambda a: a.astype(F32)),
    "v_cvt_f16_f32": ("f", lambda a: _half(a)),
    "v_cvt_pk_f16_f32": ("ff", lambda a, b: _half(a) | _half(b) << 16),
    "v_cvt_pk_bf16_f32": ("ff", lambda a, b: floats.to_bf16(a) | floats.to_bf16(b) << 16),
}
"""Rows of vector.SIMPLE."""
for _n in range(4):
    PLAIN_CONVERSIONS[f"v_cvt_f32_ubyte{_n}"] = (
        "u",
        lambda a, at=8 * _n: (a >> at & 255).astype(F32),
    )


def _scale(x: np.ndarray) -> np.ndarray:
    """Power of two of a scale operand: its exponent field alone counts; 255 is NaN."""
    field = (np.asarray(x).view(U32) >> 23 & 255).astype(np.float64)
    return np.where(field == 255, np.nan, np.exp2(field - 127))


_ENCODE = {
    "f32": lambda x: x.astype(F32).view(U32),
    "bf16": lambda x: floats.to_bf16(x.astype(F32)),
    "f16": lambda x: _half(x.astype(F32)),
}
_DECODE = {"bf16": floats.from_bf16, "f16": lambda x: x.astype(U16).view(F16).astype(F32)}


def _small_to_wide(i: Instruction, kernel: Kernel) -> Run:
    """v_cvt_scalef32_pk_{f32,bf16,f16}_{fp8,bf8,fp4}: values times the power of two of the scale.
    op_sel names the half of the register (fp8), or the byte (fp4)."""
    wide, small = re.match(r"v_cvt_scalef32_pk_(\w+?)_(\w+)$", i.name).groups()
    form, encode, row = _format(small, kernel), _ENCODE[wide], i.get("vdst") - 256
    read, scale = vector(i.get("src0"), i.literal, "u"), vector(i.get("src1"), i.literal, "f")
    at = (i.get("opsel") & 3) * 8 if small == "fp4" else (i.get("opsel") & 1) * 16
    code = (1 << form.bits) - 1

    def run(w: Waves) -> None:
        source, factor = read(w) >> at, _scale(scale(w))
        low = encode(form.values[source & code] * factor)
        high = encode(form.values[source >> form.bits & code] * factor)
        w.set_vectors(row, *((low, high) if wide == "f32" else (low | high << 16,)))

    return run


def _narrow(i: Instruction, form: floats.Format, pair: list[Read], scale: Read | None) -> Run:
    """Two values over the power of two of the scale, into a half or (fp4) byte of the register that
    op_sel names; FP16_OVFL of the mode makes what is too large the largest value."""
    row, step = i.get("vdst") - 256, 2 * form.bits
    shift = step * (i.get("opsel") >> 2 & 3 if step == 8 else i.get("opsel") >> 3 & 1)
    keep = 0xFFFFFFFF & ~((1 << step) - 1 << shift)

    def run(w: Waves) -> None:
        factor, saturate = _scale(scale(w)) if scale else 1.0, bool(w.mode[0] >> 23 & 1)
        low, high = (form.encode(read(w).astype(np.float64) / factor, saturate) for read in pair)
        w.set_vector(row, w.vector[row] & keep | (low | high << form.bits) << shift)

    return run


def _wide_to_small(i: Instruction, kernel: Kernel) -> Run:
    """v_cvt_scalef32_pk_{fp8,bf8,fp4}_{f32,bf16,f16}."""
    small, wide = re.match(r"v_cvt_scalef32_pk_(\w+?)_(\w+)$", i.name).groups()
    if wide == "f32":
        a, b, scale = sources(i, "fff")
        return _narrow(i, _format(small, kernel), [a, b], scale)
    both, scale = vector(i.get("src0"), i.literal, "u"), vector(i.get("src1"), i.literal, "f")
    decode = _DECODE[wide]
    pair = [lambda w: decode(both(w) & 0xFFFF), lambda w: decode(both(w) >> 16)]
    return _narrow(i, _format(small, kernel), pair, scale)


def _fp8_pair(i: Instruction, kernel: Kernel) -> Run:
    """v_cvt_pk_{fp8,bf8}_f32."""
    return _narrow(i, _format(i.name.split("_")[3], kernel), sources(i, "ff"), None)


def _fp8_unpacked(i: Instruction, kernel: Kernel) -> Run:
    """v_cvt_{f32,pk_f32}_{fp8,bf8}: of the byte or half that src0_sel names."""
    form, row = _format(i.name.rsplit("_", 1)[1], kernel), i.get("vdst") - 256
    (read,), count = sources(i, "u"), 2 if "pk" in i.name else 1

    def run(w: Waves) -> None:
        value = np.array(read(w))
        w.set_vectors(row, *(form.values[value >> 8 * n & 255] for n in range(count)))

    return run


CONVERSIONS: Kinds = [
    (r"v_cvt_(pk_)?f32_(fp8|bf8)", _fp8_unpacked),
    (r"v_cvt_scalef32_pk_(f32|bf16|f16)_(fp8|bf8|fp4)", _small_to_wide),
    (r"v_cvt_scalef32_pk_(fp8|bf8|fp4)_(f32|bf16|f16)", _wide_to_small),
    (r"v_cvt_pk_(fp8|bf8)_f32", _fp8_pair),
]
