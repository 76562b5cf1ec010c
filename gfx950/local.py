"""What LDS instructions have of their own: transposed reads, names of atomics, and lanes that
exchange values by way of its crossbar (CDNA4 ISA, "Data Share Operations")."""

from __future__ import annotations

import re

import numpy as np

from .code_object import Kernel
from .memory import accesses, atomic, load, loaded, local_offsets, receive, row_of, store
from .operands import Kinds, Run
from .program import Instruction
from .waves import LANES, U32, Waves


def _read_transposed(i: Instruction, kernel: Kernel) -> Run:
    """ds_read_b64_tr_b{16,8}: 16 lanes read 8 bytes each, a block of rows of 16 elements; of b16,
    4 lanes hold a row, of b8, 2. Lane n gets column n."""
    bits = int(i.name.rsplit("_b", 1)[1])
    if bits not in (8, 16):
        raise NotImplementedError(i.name)
    lanes, each = 16 * bits // 64, 64 // bits
    row, (find,) = row_of(i, kernel, "vdst"), accesses(i, kernel)

    def run(w: Waves) -> None:
        both = np.stack(loaded(w, i, find, 8), axis=-1)
        elements = both.view(f"u{bits // 8}")
        blocks = elements.reshape(w.count, 4, 16 // lanes, lanes, each)  # wave, group, row, ...
        turned = blocks.transpose(0, 1, 3, 4, 2).reshape(w.count, LANES, each)
        result = np.ascontiguousarray(turned).view(U32)
        receive(w, i, row, [result[..., 0], result[..., 1]])

    return run


def _permute(i: Instruction, kernel: Kernel) -> Run:
    """Values of other lanes, pulled (bpermute) or pushed; 0 from lanes that are not active."""
    (step,), pull = local_offsets(i), "bpermute" in i.name
    row, address, data = (i.get(name) - 256 for name in ("vdst", "addr", "data0"))

    def run(w: Waves) -> None:
        lane = (w.vector[address] + step >> 2 & 63).astype(np.intp)
        source = w.vector[data] if w.all else np.where(w.exec, w.vector[data], U32(0))
        if pull:
            result = np.take_along_axis(source, lane, axis=1)
        else:
            result = np.zeros_like(source)
            for n in range(LANES):
                pushes = w.exec[:, n]
                result[np.flatnonzero(pushes), lane[pushes, n]] = source[pushes, n]
        _exchanged(w, i, row, result)

    return run


def _swizzle(i: Instruction, kernel: Kernel) -> Run:
    """Values of other lanes by a fixed pattern: four lanes permuted, or bits of the lane's number
    kept, set and flipped."""
    (pattern,), lane = local_offsets(i), np.arange(LANES)
    if pattern >= 0xC000:
        raise NotImplementedError(f"ds_swizzle pattern {pattern:#x}")
    if pattern & 0x8000:
        source = lane & ~3 | pattern >> 2 * (lane & 3) & 3
    else:
        source = lane & 32 | ((lane & pattern & 31) | pattern >> 5 & 31) ^ pattern >> 10 & 31
    row, data = i.get("vdst") - 256, i.get("addr") - 256

    def run(w: Waves) -> None:
        values = np.where(w.exec[:, source], w.vector[data][:, source], U32(0))
        _exchanged(w, i, row, values)

    return run


def _exchanged(w: Waves, i: Instruction, row: int, values: np.ndarray) -> None:
    lanes = w.exec
    deliver = lambda: np.copyto(w.vector[row], values, where=lanes)  # noqa: E731
    w.issue(i, deliver, w.vector[row : row + 1])


_UNSIGNED = {"min_u": "umin", "max_u": "umax", "min_i": "smin", "max_i": "smax"}


def _atomic(i: Instruction, kernel: Kernel) -> Run:
    stem, kind, bits = re.match(r"ds_(\w+?)(?:_rtn)?_([buif])(\d+)$", i.name).groups()
    operation = _UNSIGNED.get(f"{stem}_{kind}", f"{stem}_f{bits}" if kind == "f" else stem)
    return atomic(i, kernel, "swap" if operation == "wrxchg" else operation)


LOCAL: Kinds = [
    (r"ds_read_b\d+_tr_b\d+", _read_transposed),
    (r"ds_read2?(st64)?_[bui]\w+", load),
    (r"ds_write2?(st64)?_b\w+", store),
    (r"ds_b?permute_b32", _permute),
    (r"ds_swizzle_b32", _swizzle),
    (r"ds_(add|sub|and|or|xor|min|max|wrxchg)(_rtn)?_[buif]\d+", _atomic),
]
