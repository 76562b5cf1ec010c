"""Matrix instructions: D = A·B + C of one wave, and moves to and from accumulation registers.

Layouts: CDNA3 and CDNA4 ISA, "Matrix Arithmetic Instructions". A lane l of an MxNxK instruction
holds elements of row l mod M of A and of column l mod N of B.
"""

from __future__ import annotations

import re

import numpy as np

from . import floats
from .code_object import Kernel
from .operands import Kinds, Run, constant, vector
from .program import Instruction
from .waves import F32, LANES, U8, U32, Waves

F8F6F4 = (floats.E4M3, floats.E5M2, floats.E2M3, floats.E3M2, floats.E2M1)
"""Formats by cbsz and blgp of the f8f6f4 instructions."""
_BITS = {"bf16": 16, "f16": 16, "f32": 32, "xf32": 32, "fp8": 8, "bf8": 8}
_NAME = re.compile(
    r"v_mfma_(scale_)?f32_(\d+)x\d+x(\d+)_?"
    r"(bf16|f16|xf32|f32|fp8_fp8|fp8_bf8|bf8_fp8|bf8_bf8|f8f6f4)$"
)


def _elements(raw: np.ndarray, kind: str, form: floats.Format | None) -> np.ndarray:
    """float32 [waves, 64, n] of what registers [register, wave, lane] hold."""
    raw = np.ascontiguousarray(raw.transpose(1, 2, 0))
    if kind == "f32":
        return raw.view(F32)
    if kind == "xf32":  # 10 bits of mantissa
        return (raw + 0xFFF + (raw >> 13 & 1) & 0xFFFFE000).view(F32)
    if kind in ("bf16", "f16"):
        half = raw.view(np.uint16)
        return floats.from_bf16(half) if kind == "bf16" else half.view(np.float16).astype(F32)
    octets = raw.view(U8)
    if form.bits == 8:
        return form.values[octets]
    bits = np.unpackbits(octets, axis=-1, bitorder="little")
    bits = bits.reshape(*octets.shape[:2], -1, form.bits)
    return form.values[(bits << np.arange(form.bits, dtype=U8)).sum(-1)]


def _operand(values: np.ndarray, rows: int, split: bool) -> np.ndarray:
    """[waves, rows, K] of a lane's elements: one run of K after another in the groups of lanes.
    `split`: 8-bit elements of the f8f6f4 instructions, of which a lane's first 16 belong to one
    half of K and the others to the other."""
    waves = len(values)
    parts = values.reshape(waves, LANES // rows, rows, 2 if split else 1, -1)
    return parts.transpose(0, 2, 3, 1, 4).reshape(waves, rows, -1)


def _accumulator(registers: np.ndarray, rows: int) -> np.ndarray:
    """[waves, M, N] of C registers: lane l has column l mod N, its registers runs of 4 rows."""
    count, waves, _ = registers.shape
    parts = registers.reshape(count // 4, 4, waves, LANES // rows, rows)
    return parts.transpose(2, 0, 3, 1, 4).reshape(waves, rows, rows)


def _registers(matrix: np.ndarray, count: int) -> np.ndarray:
    """The reverse of _accumulator."""
    waves, rows, _ = matrix.shape
    parts = matrix.reshape(waves, count // 4, LANES // rows, 4, rows)
    return parts.transpose(1, 3, 0, 2, 4).reshape(count, waves, LANES)


def _scales(w: Waves, code: int, select: int, rows: int) -> np.ndarray:
    """float64 [waves, rows, K / 32, 1] of the e8m0 scales: lane l has that of row l mod rows, block
    l div rows, in the byte that op_sel names; 255 is NaN."""
    raw = np.broadcast_to(vector(code, None, "u")(w), (w.count, LANES))
    octet = (raw >> 8 * select & 255).astype(np.int64)
    power = np.where(octet == 255, np.nan, np.exp2(octet - 127.0))
    return power.reshape(w.count, LANES // rows, rows).transpose(0, 2, 1)[..., None]


def _scaled(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    blocks = values.reshape(*scales.shape[:3], 32)
    return (blocks * scales).reshape(values.shape)


def _multiply(i: Instruction, kernel: Kernel) -> Run:
    found = _NAME.match(i.name)
    if not found:
        raise NotImplementedError(i.name)
    scale, rows, depth, kinds = found[1], int(found[2]), int(found[3]), found[4]
    mixed, small = kinds == "f8f6f4", floats.formats(kernel.arch)
    if mixed:
        names = [str(i.get("cbsz")), str(i.get("blgp"))]
        forms = [F8F6F4[int(name)] for name in names]
    elif i.get("cbsz") or i.get("blgp"):
        raise NotImplementedError(f"{i.name} with broadcast")
    else:
        names = kinds.split("_") if "_" in kinds else [kinds, kinds]
        forms = [small.get(name) for name in names]
    widths = [form.bits if form else _BITS[name] for name, form in zip(names, forms)]
    counts = [rows * depth * width // (32 * LANES) for width in widths]
    size, at = rows * rows // LANES, kernel.accumulators_at
    first = [i.get(f"src{n}") - 256 + (at if i.bit("acc", n) else 0) for n in range(2)]
    shift = at if i.get("acc_cd") else 0
    out, start = i.get("vdst") - 256 + shift, constant(i.get("src2"), None, "f")
    c_row = i.get("src2") - 256 + shift
    select = [i.bit("opsel", n) + 2 * i.bit("opsel_hi", n) for n in range(2)]

    def run(w: Waves) -> None:
        sides = []
        for n in range(2):
            raw = w.vector[first[n] : first[n] + counts[n]]
            values = _elements(raw, names[n], forms[n])
            values = _operand(values, rows, mixed and widths[n] == 8)
            if scale:
                values = _scaled(values, _scales(w, i.get(f"scale_src{n}"), select[n], rows))
            sides.append(values)
        product = np.matmul(sides[0], sides[1].transpose(0, 2, 1))
        c = start
        if c is None:
            c = _accumulator(w.vector[c_row : c_row + size].view(F32), rows)
        w.vector[out : out + size] = _registers((product + c).astype(F32), size).view(U32)

    return run


def _move(i: Instruction, kernel: Kernel) -> Run:
    """v_accvgpr_read, _write and _mov_b32."""
    at = kernel.accumulators_at
    target = i.get("vdst") - 256 + (0 if "read" in i.name else at)
    code = i.get("src0") + (0 if "write" in i.name else at)
    read = vector(code, i.literal, "u")
    return lambda w: w.set_vector(target, np.asarray(read(w)))


MATRIX: Kinds = [(r"v_mfma_\w+", _multiply), (r"v_accvgpr_\w+", _move)]
