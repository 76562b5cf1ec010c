"""LDS instructions: reads, writes, transposed reads, atomics, and lanes that exchange values by way
of its crossbar (CDNA4 ISA, "Data Share Operations")."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .code_object import Kernel
from .memory import atomic, check_lds, chosen, gather, receive, scatter, stored
from .operands import Run
from .program import Instruction
from .waves import I64, LANES, U32, Waves


def _places(w: Waves, i: Instruction, how: str, step: int, size: int, values=()) -> np.ndarray:
    """Places of an access; the watches are told."""
    at = w.vector[i.get("addr") - 256].astype(I64) + step
    check_lds(w, at, size)
    at = at + w.lds_at if w.all else np.where(w.exec, at + w.lds_at, w.lds_at)
    for each in w.shared.watches:
        each.local(w, i, how, at, size, w.active, values)
    return at


def offsets(i: Instruction) -> tuple[list[int], int]:
    """Byte offsets of the accesses of an instruction, and the bytes of each."""
    two = re.match(r"ds_(?:read|write)2(st64)?_b(32|64)", i.name)
    if two:
        size = int(two[2]) // 8
        unit = size * (64 if two[1] else 1)
        return [i.get("offset0") * unit, i.get("offset1") * unit], size
    bits = re.search(r"_[buif](\d+)", i.name)
    return [i.get("offset0") | i.get("offset1") << 8], int(bits[1]) // 8


def _read(i: Instruction, kernel: Kernel) -> Run:
    steps, size = offsets(i)
    row = i.get("vdst") - 256 + (kernel.accumulators_at if i.get("acc") else 0)

    def run(w: Waves) -> None:
        values = []
        for step in steps:
            values += gather(w.shared.lds, _places(w, i, "read", step, size), size)
        receive(w, i, "local", row, values)

    return run


def _write(i: Instruction, kernel: Kernel) -> Run:
    steps, size = offsets(i)
    more = -256 + (kernel.accumulators_at if i.get("acc") else 0)
    rows = [i.get("data0") + more, i.get("data1") + more]

    def run(w: Waves) -> None:
        for step, row in zip(steps, rows):
            values = stored(w, i, row, max(1, size // 4), w.active)
            at = _places(w, i, "write", step, size, values)
            scatter(w.shared.lds, chosen(w, at, w.active), values, size)
        w.issue(i, "local")

    return run


def _read_transposed(i: Instruction, kernel: Kernel) -> Run:
    """ds_read_b64_tr_b{16,8}: 16 lanes read 8 bytes each, a block of rows of 16 elements; of b16,
    4 lanes hold a row, of b8, 2. Lane n gets column n."""
    bits = int(i.name.rsplit("_b", 1)[1])
    if bits not in (8, 16):
        raise NotImplementedError(i.name)
    lanes, each = 16 * bits // 64, 64 // bits
    row = i.get("vdst") - 256 + (kernel.accumulators_at if i.get("acc") else 0)
    (step,), _ = offsets(i)

    def run(w: Waves) -> None:
        both = np.stack(gather(w.shared.lds, _places(w, i, "read", step, 8), 8), axis=-1)
        elements = both.view(f"u{bits // 8}")
        blocks = elements.reshape(w.count, 4, 16 // lanes, lanes, each)  # wave, group, row, ...
        turned = blocks.transpose(0, 1, 3, 4, 2).reshape(w.count, LANES, each)
        result = np.ascontiguousarray(turned).view(U32)
        receive(w, i, "local", row, [result[..., 0], result[..., 1]])

    return run


def _permute(i: Instruction, kernel: Kernel) -> Run:
    """Values of other lanes, pulled (bpermute) or pushed; 0 from lanes that are not active."""
    step, pull = i.get("offset0") | i.get("offset1") << 8, "bpermute" in i.name
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
    pattern, lane = i.get("offset0") | i.get("offset1") << 8, np.arange(LANES)
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
    w.issue(
        i,
        "local",
        lambda: np.copyto(w.vector[row], values, where=lanes),
        w.vector[row : row + 1],
    )


_UNSIGNED = {"min_u": "umin", "max_u": "umax", "min_i": "smin", "max_i": "smax"}


def _atomic(i: Instruction, kernel: Kernel) -> Run:
    stem, kind, bits = re.match(r"ds_(\w+?)(?:_rtn)?_([buif])(\d+)$", i.name).groups()
    operation = _UNSIGNED.get(f"{stem}_{kind}", f"{stem}_f{bits}" if kind == "f" else stem)
    operation = "swap" if operation == "wrxchg" else operation
    size, step = int(bits) // 8, i.get("offset0") | i.get("offset1") << 8

    def find(w: Waves) -> tuple:
        at = w.vector[i.get("addr") - 256].astype(I64) + step
        check_lds(w, at, size)
        return w.shared.lds, np.where(w.exec, at, 0) + w.lds_at, w.active, None

    return atomic(i, kernel, find, operation, size)


_KINDS: list[tuple[str, Callable[[Instruction, Kernel], Run]]] = [
    (r"ds_read_b64_tr_b\d+", _read_transposed),
    (r"ds_read2?(st64)?_[bui]\w+", _read),
    (r"ds_write2?(st64)?_b\w+", _write),
    (r"ds_b?permute_b32", _permute),
    (r"ds_swizzle_b32", _swizzle),
    (r"ds_(add|sub|and|or|xor|min|max|wrxchg)(_rtn)?_[buif]\d+", _atomic),
]


def compile_local(i: Instruction, kernel: Kernel) -> Run | None:
    """The instruction as a function of the waves, None when it is not known here."""
    for pattern, make in _KINDS:
        if re.fullmatch(pattern, i.name):
            return make(i, kernel)
    return None
