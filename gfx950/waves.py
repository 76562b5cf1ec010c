"""State of a batch of waves that are at the same instruction, and its global memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .code_object import Kernel
from .program import EXEC, Instruction

U8, U16, U32, U64, I64, F32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64, np.float32
LANES = 64


class Fault(Exception):
    """What the hardware would not forgive, as an access outside of every buffer."""


def packed(mask: np.ndarray) -> np.ndarray:
    """uint32 [waves, 2] of bool [waves, 64]."""
    return np.packbits(mask, axis=1, bitorder="little").view(U32)


def unpacked(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """bool [waves, 64] of two uint32 [waves]."""
    pair = np.stack([low, high], axis=1).astype(U32)
    return np.unpackbits(pair.view(U8), axis=1, bitorder="little").view(bool)


class Memory:
    """Global memory: buffers with forbidden ground between them, at addresses that need 64 bits."""

    BASE = 0x7F12_3400_0000
    GAP = 4096

    def __init__(self, size: int, seed: int = 0):
        self.bytes = np.random.default_rng(seed).integers(0, 256, size // 8 * 8 + 64, U8)
        self.words = self.bytes.view(U32)
        self.owned = np.zeros(len(self.bytes), bool)
        self._end = self.GAP

    def allocate(self, size: int) -> int:
        """Address of `size` fresh bytes, aligned to 256."""
        at, self._end = self._end, (self._end + size + self.GAP + 255) // 256 * 256
        if self._end > len(self.owned):
            raise MemoryError(f"{self._end} bytes are needed, {len(self.owned)} are there")
        self.owned[at : at + size] = True
        return self.BASE + at

    def view(self, address: int, size: int) -> np.ndarray:
        """The bytes at `address`, to read or write."""
        return self.bytes[address - self.BASE : address - self.BASE + size]

    def put(self, array: np.ndarray) -> int:
        """Address of a copy of `array`."""
        raw = np.ascontiguousarray(array).reshape(-1).view(U8)
        address = self.allocate(len(raw))
        self.view(address, len(raw))[:] = raw
        return address

    def places(self, addresses: np.ndarray, size: int, active: np.ndarray | None) -> np.ndarray:
        """int64 places in `bytes` of uint64 addresses, of inactive lanes any. Raises Fault unless
        `size` bytes there belong to a buffer."""
        at = (addresses - U64(self.BASE)).view(I64)
        if active is not None:
            at = np.where(active, at, I64(self.GAP))
        outside = (at < 0) | (at >= len(self.owned) - size)
        inside = np.where(outside, 0, at)
        bad = outside | ~(self.owned[inside] & self.owned[inside + (size - 1)])
        if active is not None:
            bad &= active
        if bad.any():
            first = [hex(each) for each in np.broadcast_to(addresses, bad.shape)[bad][:4]]
            raise Fault(f"{size} bytes at {', '.join(first)} are in no buffer")
        return at


class Watch:
    """Told what the waves of a launch do while they do it; what a kind of watch does not care for
    it leaves as here. `at` are places [waves, 64], in `Memory.bytes` or in the LDS of the launch,
    `active` the lanes that count (None: all), `values` registers as flat arrays of those lanes."""

    def begin(self, w: Waves) -> None:
        """Waves were set up; their LDS is fresh."""

    def memory(self, w, i: Instruction, how: str, at, size: int, active, values=()) -> None:
        """A global access: `how` is "read", "write" or "atomic"."""

    def local(self, w, i: Instruction, how: str, at, size: int, active, values=()) -> None:
        """An LDS access: `how` may also be "direct", a load whose data go there."""

    def issue(self, w: Waves, i: Instruction) -> None:
        """An access that raises `i.counter`."""

    def wait(self, w: Waves, vector: int, local: int) -> None:
        """s_waitcnt: at most so many accesses are outstanding."""

    def barrier(self, w: Waves) -> None:
        """The waves came to a barrier."""

    def branch(self, w: Waves, i: Instruction, taken: np.ndarray) -> None:
        """A conditional branch, and which waves take it."""

    def findings(self) -> list:
        """What was found, as hazards.Finding."""
        return []


@dataclass
class Shared:
    """What all waves of a launch share. LDS and scratch are bytes of all that run at a time."""

    kernel: Kernel
    memory: Memory
    lds: np.ndarray
    lds_size: int
    scratch: np.ndarray
    scratch_size: int
    watches: Sequence[Watch] = ()
    noise: np.random.Generator | None = None
    """Given: loads arrive when they are waited for, until then their registers hold noise."""


_BY_WAVE = dict.fromkeys(("scc", "mode", "ids", "slot", "group", "lds_at"), 0)
_BY_WAVE |= {"vector": 1, "scalar": 1}
"""Axis of the waves in each array of Waves."""


@dataclass
class Waves:
    """`count` waves in lockstep. Vector registers are [register, wave, lane] with the accumulation
    registers behind the others, scalar registers [register, wave]."""

    vector: np.ndarray
    scalar: np.ndarray
    scc: np.ndarray
    mode: np.ndarray
    ids: np.ndarray
    """Number of each wave in the launch."""
    slot: np.ndarray
    """Number of each wave among those that run at a time."""
    group: np.ndarray
    """Number of each wave's workgroup in the launch."""
    lds_at: np.ndarray
    """Place of each wave's LDS, int64 [waves, 1]."""
    shared: Shared
    at: int = 0
    """Address of the next block."""
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    """Pairs of scalar registers that are known as bool [waves, 64]."""
    queue: deque = field(default_factory=deque)
    """(counter, deliver) of loads that have not arrived; of a wave on its own."""

    def __post_init__(self):
        self.count = len(self.ids)
        self.exec_changed()

    def exec_changed(self) -> None:
        self.exec = unpacked(self.scalar[EXEC], self.scalar[EXEC + 1])
        self.all = bool(self.exec.all())

    @property
    def active(self) -> np.ndarray | None:
        """Mask of active lanes, None when all are."""
        return None if self.all else self.exec

    def part(self, chosen: np.ndarray) -> Waves:
        """The chosen waves on their own."""
        arrays = {
            name: np.compress(chosen, getattr(self, name), axis) for name, axis in _BY_WAVE.items()
        }
        return replace(self, **arrays, masks={}, queue=deque())

    @staticmethod
    def joined(parts: list[Waves]) -> Waves:
        """Batches at one address as one."""
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate([part.ids for part in parts]))
        arrays = {
            name: np.concatenate([getattr(part, name) for part in parts], axis).take(order, axis)
            for name, axis in _BY_WAVE.items()
        }
        return replace(parts[0], **arrays, masks={})

    def mask(self, register: int) -> np.ndarray:
        """A pair of scalar registers as bool [waves, 64]."""
        found = self.masks.get(register)
        if found is None:
            found = unpacked(self.scalar[register], self.scalar[register + 1])
            self.masks[register] = found
        return found

    def set_mask(self, register: int, mask: np.ndarray) -> None:
        """Writes a pair of scalar registers from bool [waves, 64]."""
        self.scalar[register : register + 2] = packed(mask).T
        self._forget(register)
        if register == EXEC:
            self.exec_changed()
        else:
            self.masks[register] = mask

    def _forget(self, register: int) -> None:
        for each in (register - 1, register, register + 1) if self.masks else ():
            self.masks.pop(each, None)

    def set_scalar(self, register: int, value: np.ndarray) -> None:
        """Writes one scalar register, or two from 64-bit values."""
        if value.dtype.itemsize == 8:
            value = value.view(U64)
            self.scalar[register] = value.astype(U32)
            self.scalar[register + 1] = (value >> 32).astype(U32)
        else:
            self.scalar[register] = value
        self._forget(register)
        if register >= EXEC:
            self.exec_changed()

    def set_vector(self, row: int, value: np.ndarray) -> None:
        """Writes one vector register in active lanes, or two from 64-bit values. A 16-bit value
        makes its register's upper half 0."""
        size = value.dtype.itemsize
        if size == 8:
            value = value.view(U64)
            self.set_vector(row, value.astype(U32))
            row, value = row + 1, (value >> 32).astype(U32)
        else:
            value = value.view(U32) if size == 4 else value.view(np.uint16).astype(U32)
        if self.all:
            self.vector[row] = value
        else:
            np.copyto(self.vector[row], value, where=self.exec)

    def set_vectors(self, row: int, *values: np.ndarray) -> None:
        """Writes registers from `row` on; all values are there before the first is written."""
        for n, value in enumerate(values):
            self.set_vector(row + n, value)

    def issue(
        self,
        i: Instruction,
        deliver: Callable[[], None] | None = None,
        registers: np.ndarray | None = None,
    ) -> None:
        """An access that raises `i.counter`. A load's data are delivered now, or, where loads are
        late, at the wait for them, with noise in `registers` until then."""
        for each in self.shared.watches:
            each.issue(self, i)
        if self.shared.noise is not None:
            if registers is not None:
                noise = self.shared.noise.integers(0, 2**32, registers.shape, U32)
                np.copyto(registers, noise, where=self.exec if registers.ndim == 3 else True)
            self.queue.append((i.counter, deliver))
        elif deliver:
            deliver()

    def wait(self, vector: int, local: int) -> None:
        """Delivers loads until at most so many accesses are outstanding. Scalar loads share the
        counter of the LDS and arrive in any order, so only 0 waits for them."""
        for each in self.shared.watches:
            each.wait(self, vector, local)
        if not self.queue:
            return
        if local and any(counter == "scalar" for counter, _ in self.queue):
            local = len(self.queue)
        left, kept, due = {True: vector, False: local}, [], []
        for each in reversed(self.queue):
            left[each[0] == "vector"] -= 1
            (kept if left[each[0] == "vector"] >= 0 else due).append(each)
        self.queue = deque(reversed(kept))
        for _, deliver in reversed(due):
            if deliver:
                deliver()
