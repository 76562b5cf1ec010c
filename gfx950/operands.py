"""Operands of instructions as functions of the waves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .code_object import Kernel
from .program import FLOATS, Instruction
from .waves import LANES, U16, U32, U64, Waves

Read = Callable[[Waves], np.ndarray]
Run = Callable[[Waves], None]
"""An instruction as a function of the waves."""
Kinds = list[tuple[str, Callable[[Instruction, Kernel], Run]]]
"""Patterns of names, and what makes a Run of such an instruction. It may raise NotImplementedError
and KeyError for forms that are missing."""
TYPES = {
    "u": np.uint32,
    "i": np.int32,
    "f": np.float32,
    "U": np.uint64,
    "I": np.int64,
    "d": np.float64,
    "h": np.float16,
    "s": np.uint16,
    "t": np.int16,
}
"""Letters of operand types. U, I and d take two registers, h, s and t half of one."""


def constant(code: int, literal: int | None, kind: str) -> np.generic | None:
    """The value of an operand code that names no register, None for one that does."""
    dtype = TYPES[kind]
    size = np.dtype(dtype).itemsize
    if 128 <= code <= 208:  # 0 to 64, -1 to -16: bits, also for floats
        value = code - 128 if code <= 192 else 192 - code
        return np.array(value, f"i{size}").view(dtype)[()]
    if 240 <= code <= 248:  # as wide as the operand, 32 bits for integers
        width = 4 if kind in "uiUI" else size
        bits = np.array(FLOATS[code - 240], f"f{width}").view(f"u{width}")
    elif code == 255:
        bits = np.array(literal, U32)
        if kind == "d":
            return (bits.astype(U64) << U64(32)).view(dtype)[()]
        if kind in "iI":
            bits = bits.view(np.int32)
    else:
        return None
    return bits.astype(f"{bits.dtype.kind}{size}").view(dtype)[()]


def scalar(code: int, literal: int | None, kind: str) -> Read:
    """A scalar operand: [waves], or a number."""
    value = constant(code, literal, kind)
    if value is not None:
        return lambda w: value
    dtype = TYPES[kind]
    if code == 253:
        return lambda w: w.scc.astype(dtype)
    if code in (251, 252):
        pair = 106 if code == 251 else 126
        return lambda w: ((w.scalar[pair] | w.scalar[pair + 1]) == 0).astype(dtype)
    if np.dtype(dtype).itemsize == 8:
        return lambda w: _pair(w.scalar, code, dtype)
    if dtype is U32:
        return lambda w: w.scalar[code]
    return lambda w: w.scalar[code].view(dtype)


def _pair(registers: np.ndarray, row: int, dtype: type) -> np.ndarray:
    return (registers[row].astype(U64) | registers[row + 1].astype(U64) << U64(32)).view(dtype)


def raw_vector(row: int, kind: str, high: bool = False) -> Read:
    """A vector register: [waves, 64]."""
    dtype = TYPES[kind]
    size = np.dtype(dtype).itemsize
    if size == 8:
        return lambda w: _pair(w.vector, row, dtype)
    if size == 2:
        shift = 16 if high else 0
        return lambda w: (w.vector[row] >> shift).astype(U16).view(dtype)
    if dtype is U32:
        return lambda w: w.vector[row]
    return lambda w: w.vector[row].view(dtype)


def vector(code: int, literal: int | None, kind: str, high: bool = False) -> Read:
    """An operand of a vector instruction: [waves, 64], [waves, 1] or a number."""
    if code >= 256:
        return raw_vector(code - 256, kind, high)
    value = constant(code, literal, kind)
    if value is not None:
        return lambda w: value
    if kind in "hst":
        whole, shift, dtype = scalar(code, literal, "u"), 16 if high else 0, TYPES[kind]
        return lambda w: (whole(w)[:, None] >> shift).astype(U16).view(dtype)
    read = scalar(code, literal, kind)
    return lambda w: read(w)[:, None]


_SIGN = {"u": (U32, 1 << 31), "f": (U32, 1 << 31), "d": (U64, 1 << 63), "h": (U16, 1 << 15)}


def with_sign(read: Read, kind: str, negate: bool, absolute: bool) -> Read:
    """`read` with the modifiers |x| and -x."""
    if not (negate or absolute) or kind not in _SIGN:
        return read
    bits, sign = _SIGN[kind]

    def modified(w: Waves) -> np.ndarray:
        x = np.asarray(read(w))
        y = x.view(bits) & bits(sign - 1) if absolute else x.view(bits)
        return (y ^ bits(sign) if negate else y).view(x.dtype)

    return modified


def _selected(read: Read, select: int, extend: bool) -> Read:
    """SDWA: a byte (0 to 3), half (4, 5) or all (6) of a 32-bit operand."""
    if select == 6:
        return read
    shift = 8 * select if select < 4 else 16 * (select - 4)
    dtype = (np.int8 if extend else np.uint8) if select < 4 else (np.int16 if extend else U16)
    return lambda w: (
        (np.asarray(read(w)).view(U32) >> shift).astype(dtype).astype(np.int32).view(U32)
    )


def _as(read: Read, kind: str) -> Read:
    """Low bits of a uint32 operand as another type."""
    dtype = TYPES[kind]
    if np.dtype(dtype).itemsize == 4:
        return lambda w: read(w).view(dtype)
    return lambda w: read(w).astype(U16).view(dtype)


def dpp_lanes(control: int) -> tuple[np.ndarray, np.ndarray]:
    """Source lane of every lane under a DPP control, and whether there is one (CDNA ISA, "Data
    Parallel Primitives"). Raises NotImplementedError for a control that gfx9 does not have."""
    lane = np.arange(LANES)
    row, within = lane & ~15, lane & 15
    kind, count = control & 0x1F0, control & 15
    valid = np.ones(LANES, bool)
    if control < 0x100:  # quad_perm
        return lane & ~3 | (control >> 2 * (lane & 3)) & 3, valid
    if kind == 0x100:  # row_shl
        return row + (within + count & 15), within + count < 16
    if kind == 0x110:  # row_shr
        return row + (within - count & 15), within >= count
    if kind == 0x120:  # row_ror
        return row + (within - count & 15), valid
    if control in (0x130, 0x134, 0x138, 0x13C):  # wave_shl, wave_rol, wave_shr, wave_ror
        source = lane + (1 if control < 0x138 else -1)
        rotates = control in (0x134, 0x13C)
        return source & 63, valid if rotates else (source >= 0) & (source < LANES)
    if control == 0x140:  # row_mirror
        return row + 15 - within, valid
    if control == 0x141:  # row_half_mirror
        return lane ^ 7, valid
    if control == 0x142:  # row_bcast:15
        return np.maximum(row - 1, 0), lane >= 16
    if control == 0x143:  # row_bcast:31
        return np.full(LANES, 31), lane >= 32
    if kind == 0x150:  # row_newbcast
        return row + count, valid
    raise NotImplementedError(f"DPP control {control:#x}")


def _dpp(i: Instruction, kind: str) -> Read:
    """Source 0 from other lanes; 0 where there is none."""
    lanes, valid = dpp_lanes(i.get("dpp"))
    read, everywhere = raw_vector(i.get("vsrc0") - 256, kind), bool(valid.all())

    def moved(w: Waves) -> np.ndarray:
        value = read(w)[:, lanes]
        if everywhere and w.all:
            return value
        return np.where(valid & w.exec[:, lanes], value, value.dtype.type(0))

    return moved


def sources(i: Instruction, types: str) -> list[Read]:
    """Readers of the operands src0, src1 and src2, with sub-dword, lane and sign modifiers."""
    reads = []
    for n, (name, kind) in enumerate(zip(("src0", "src1", "src2"), types)):
        if n == 1 and i.has("vsrc1"):
            name = "vsrc1"
        negate, absolute = i.bit("neg", n), i.bit("abs", n)
        if ("SDWA" in i.form or "DPP" in i.form) and n < 2:
            negate, absolute = bool(i.get(f"src{n}_neg")), bool(i.get(f"src{n}_abs"))
        if "SDWA" in i.form:
            code = i.get("vsrc0" if n == 0 else name) - (256 if i.get(f"s{n}") else 0)
            select, extend = i.get(f"src{n}_sel"), bool(i.get(f"src{n}_sext"))
            read = _as(_selected(vector(code, None, "u"), select, extend), kind)
        elif "DPP" in i.form and n == 0:
            read = _dpp(i, kind)
        else:
            read = vector(i.get(name), i.literal, kind, kind in "hst" and i.bit("opsel", n))
        reads.append(with_sign(read, kind, negate, absolute))
    return reads


def _dpp_written(i: Instruction) -> Callable[[Waves], np.ndarray]:
    """Lanes that a DPP instruction writes: without bound_ctrl those alone that have a source."""
    lanes, valid = dpp_lanes(i.get("dpp"))
    lane = np.arange(LANES)
    chosen = (i.get("row_mask") >> (lane >> 4)) & (i.get("bank_mask") >> (lane >> 2 & 3)) & 1 == 1
    if i.get("bc"):
        return lambda w: w.exec & chosen
    return lambda w: w.exec & chosen & valid & w.exec[:, lanes]


def _sdwa_placed(i: Instruction, row: int) -> Callable[[Waves, np.ndarray], np.ndarray]:
    """Places a result in the part of the destination that dst_sel names; dst_unused says what the
    rest becomes: 0, the sign (1), or as it was (2)."""
    select, unused = i.get("dst_sel"), i.get("dst_unused")
    shift, bits = (8 * select, 8) if select < 4 else (16 * (select - 4), 16)
    part = (1 << bits) - 1

    def place(w: Waves, value: np.ndarray) -> np.ndarray:
        value = (value & part) << shift
        if unused == 2:
            return value | w.vector[row] & (0xFFFFFFFF & ~(part << shift))
        if unused == 1:
            lost = 32 - bits - shift
            return ((value << lost).view(np.int32) >> lost).view(U32)
        return value

    return place if select != 6 else lambda w, value: value


def destination(i: Instruction) -> Callable[[Waves, np.ndarray], None]:
    """Writes a result to vdst, where DPP and SDWA say."""
    row = i.get("vdst") - 256
    if "DPP" not in i.form and "SDWA" not in i.form:
        return lambda w, value: w.set_vector(row, np.asarray(value))
    written = _dpp_written(i) if "DPP" in i.form else lambda w: w.exec
    place = _sdwa_placed(i, row) if "SDWA" in i.form else lambda w, value: value

    def write(w: Waves, value: np.ndarray) -> None:
        value = value.view(U32) if value.dtype.itemsize == 4 else value.view(U16).astype(U32)
        np.copyto(w.vector[row], place(w, value), where=written(w))

    return write
