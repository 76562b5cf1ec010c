"""Vector instructions whose lanes see each other: lanes read and written as scalars, groups of
lanes that swap, bits of a mask counted. (DPP is an operand: operands.dpp_lanes.)"""

from __future__ import annotations

import numpy as np

from .code_object import Kernel
from .operands import Kinds, Run, scalar, sources, vector
from .program import Instruction
from .waves import LANES, U32, U64, Waves


def _scalar_target(i: Instruction) -> int:
    """The scalar register in vdst, which the decoder takes for a vector register."""
    return i.get("vdst") % 256


def _first_lane(i: Instruction, kernel: Kernel) -> Run:
    read, target = vector(i.get("src0"), i.literal, "u"), _scalar_target(i)

    def run(w: Waves) -> None:
        values = np.broadcast_to(read(w), w.exec.shape)
        w.set_scalar(target, values[np.arange(w.count), np.argmax(w.exec, axis=1)])

    return run


def _read_lane(i: Instruction, kernel: Kernel) -> Run:
    read, lane = vector(i.get("src0"), i.literal, "u"), scalar(i.get("src1"), i.literal, "u")
    target = _scalar_target(i)

    def run(w: Waves) -> None:
        values, at = np.broadcast_to(read(w), w.exec.shape), np.broadcast_to(lane(w) & 63, w.count)
        w.set_scalar(target, values[np.arange(w.count), at])

    return run


def _write_lane(i: Instruction, kernel: Kernel) -> Run:
    value, lane = (scalar(i.get(f"src{n}"), i.literal, "u") for n in range(2))
    row = i.get("vdst") - 256

    def run(w: Waves) -> None:
        w.vector[row, np.arange(w.count), np.broadcast_to(lane(w) & 63, w.count)] = value(w)

    return run


def _swap_lanes(i: Instruction, kernel: Kernel) -> Run:
    """v_permlane{16,32}_swap: odd groups of the destination change places with even groups of the
    source."""
    width = 16 if "16" in i.name else 32
    a, b = i.get("vdst") - 256, i.get("src0") - 256

    def run(w: Waves) -> None:
        first, second = (w.vector[row].reshape(w.count, -1, 2, width) for row in (a, b))
        kept = first[:, :, 1].copy()
        first[:, :, 1] = second[:, :, 0]
        second[:, :, 0] = kept

    return run


def _count_below(i: Instruction, kernel: Kernel) -> Run:
    """v_mbcnt: bits of a mask below this lane, of its low or high half."""
    mask, more = sources(i, "uu")
    count = np.clip(np.arange(LANES) - (0 if "_lo_" in i.name else 32), 0, 32)
    below = ((1 << count.astype(U64)) - U64(1)).astype(U32)
    row = i.get("vdst") - 256
    return lambda w: w.set_vector(row, np.bitwise_count(mask(w) & below).astype(U32) + more(w))


LANES_MEET: Kinds = [
    (r"v_readfirstlane_b32", _first_lane),
    (r"v_readlane_b32", _read_lane),
    (r"v_writelane_b32", _write_lane),
    (r"v_permlane(16|32)_swap_b32", _swap_lanes),
    (r"v_mbcnt_(lo|hi)_u32_b32", _count_below),
]
