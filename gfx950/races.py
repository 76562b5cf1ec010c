"""Watches of a run: waves that meet in LDS or global memory with nothing that orders them, and bits
that nobody set where they are used.

All of it follows from what is ordered (barriers, waits, atomics), not from when a wave happened to
run, so that one run in lockstep finds races too.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque

import numpy as np

from .hazards import Finding
from .program import Instruction
from .waves import Watch, Waves


class _Reports(Watch):
    """A watch that collects what it finds, once an instruction."""

    kind = ""

    def __init__(self):
        self._found: dict[tuple[int, str], Finding] = {}

    def report(self, w: Waves, i: Instruction, bad: np.ndarray, what: str) -> None:
        """`bad`: which of the bytes that the instruction accesses."""
        if bad.any():
            line = w.shared.kernel.line(i.address)
            self._found.setdefault((i.address, what), Finding(self.kind, what, str(i), line))

    def findings(self) -> list[Finding]:
        return list(self._found.values())


def _bytes(number: np.ndarray, at: np.ndarray, size: int, active) -> tuple[np.ndarray, np.ndarray]:
    """(place, number of the wave) of every byte of every active lane."""
    numbers = np.broadcast_to(number[:, None], at.shape)
    at, numbers = (x.ravel() if active is None else x[active] for x in (at, numbers))
    return (at[:, None] + np.arange(size)).ravel(), np.repeat(numbers, size)


def _octets(values: list[np.ndarray], size: int) -> np.ndarray:
    """The bytes of registers, given as flat arrays, in the order of _bytes."""
    words = np.stack(values, axis=-1).astype(np.uint32)
    return words.view(np.uint8).reshape(len(values[0]), 4 * len(values))[:, :size].ravel()


def _clash(places: np.ndarray, wave: np.ndarray, octets: np.ndarray) -> np.ndarray:
    """Which bytes two waves write at once, and not the same value."""
    order = np.argsort(places, kind="stable")
    place, wave, octets = places[order], wave[order], octets[order]
    apart = (wave[1:] != wave[:-1]) & (octets[1:] != octets[:-1])
    bad = np.zeros(len(places), bool)
    bad[order[1:]] = apart & (place[1:] == place[:-1])
    return bad


class LocalRaces(_Reports):
    """LDS: bytes that a wave reads or writes while another wrote or read them since the last
    barrier, or before the write was waited for; bytes that nobody wrote."""

    kind = "local race"
    _NOBODY, _MANY, _ATOMIC = -1, -2, -3

    def begin(self, w: Waves) -> None:
        size = len(w.shared.lds)
        self.epoch = np.zeros(w.count, np.int32)  # barriers that a wave came to
        self.writer, self.reader = (np.full(size, self._NOBODY, np.int32) for _ in range(2))
        self.written, self.read = (np.full(size, -1, np.int32) for _ in range(2))
        self.pending = np.zeros(size, np.int8)  # 1: by an LDS write, 2: by a load into LDS
        self.reading = np.zeros(size, bool)  # by a read that was not waited for
        self.open: dict[int, deque] = defaultdict(
            deque
        )  # (counter, accesses) by wave, oldest first
        self.places: tuple = ()

    def local(self, w, i, how, at, size, active, values=()) -> None:
        places, wave = _bytes(w.slot, at, size, active)
        epoch, other = self.epoch[wave], self.writer[places] != wave
        if how == "read":
            self._reads(w, i, places, wave, epoch, other)
            return
        same = np.zeros(len(places), bool)
        if how != "atomic":  # several waves may write the same value to one place
            octets = _octets(values, size)
            same = w.shared.lds[places] == octets
            self.report(w, i, _clash(places, wave, octets), "waves write LDS in one place")
        known = self.writer[places] != self._NOBODY
        if how == "atomic":
            known &= self.writer[places] != self._ATOMIC
        pending, fresh = self.pending[places], self.written[places] == epoch
        bad = (pending > 0) & (other | (pending == 2)) | other & fresh
        self.report(w, i, bad & known & ~same, "LDS that another wave wrote is written")
        reader = self.reader[places]
        fresh = self.reading[places] | (self.read[places] == epoch)
        bad = (reader != wave) & (reader != self._NOBODY) & fresh
        self.report(w, i, bad & ~same, "LDS that another wave still reads is written")
        self.writer[places] = self._ATOMIC if how == "atomic" else wave
        self.written[places], self.pending[places] = epoch, 2 if how == "direct" else 1
        # Two offsets of one instruction are one access.
        self.places += ((places, wave, False),)

    def _reads(self, w, i, places, wave, epoch, other) -> None:
        pending, writer = self.pending[places], self.writer[places]
        bad = (pending == 2) | (pending == 1) & other
        self.report(w, i, bad, "LDS is read whose write was not waited for")
        bad = (pending == 0) & other & (writer != self._NOBODY) & (self.written[places] == epoch)
        self.report(w, i, bad, "LDS is read that another wave wrote since the last barrier")
        self.report(w, i, writer == self._NOBODY, "LDS is read that nobody wrote")
        reader = self.reader[places]
        shared = (self.read[places] == epoch) & (reader != wave) & (reader != self._NOBODY)
        self.reader[places] = np.where(shared, self._MANY, wave)
        self.read[places], self.reading[places] = epoch, True
        self.places += ((places, wave, True),)

    def issue(self, w: Waves, i: Instruction) -> None:
        for number in w.slot:
            mine = [(places[wave == number], reads) for places, wave, reads in self.places]
            if mine or self.open[number]:
                self.open[number].append((i.counter, mine))
        self.places = ()

    def wait(self, w: Waves, vector: int, local: int) -> None:
        for number in w.slot:
            queue = self.open[number]
            if not queue:
                continue
            # While a scalar load is under way, only 0 says which LDS accesses are done.
            unknown = local and any(counter == "scalar" for counter, _ in queue)
            left = {"vector": vector, "local": len(queue) if unknown else local}
            kept = deque()
            for counter, accesses in reversed(queue):
                kind = "vector" if counter == "vector" else "local"
                left[kind] -= 1
                if left[kind] >= 0:
                    kept.appendleft((counter, accesses))
                else:
                    self._done(number, accesses)
            self.open[number] = kept

    def _done(self, number: int, accesses: list) -> None:
        """A wave has waited for accesses: it is now that they happened at the latest."""
        for places, reads in accesses:
            if reads:
                mine = places[np.isin(self.reader[places], (number, self._MANY))]
                self.reading[mine], self.read[mine] = False, self.epoch[number]
            else:
                mine = places[np.isin(self.writer[places], (number, self._ATOMIC))]
                self.pending[mine], self.written[mine] = 0, self.epoch[number]

    def barrier(self, w: Waves) -> None:
        self.epoch[w.slot] += 1


class GlobalRaces(_Reports):
    """Global memory: bytes that one wave writes and another reads or writes, with no barrier
    between waves of a workgroup and no chain of atomics between workgroups. An atomic orders what
    its workgroup did before it, for whoever does an atomic at the same place later."""

    kind = "global race"

    def __init__(self):
        super().__init__()
        self.epoch, self.clock = Counter(), defaultdict(Counter)  # by wave, by workgroup
        self.released: dict[int, Counter] = {}
        self.group_of = np.zeros(1, np.int64)

    def begin(self, w: Waves) -> None:
        if not hasattr(self, "last"):
            size = len(w.shared.memory.bytes)
            # number of the wave plus 1 (0: nobody), its barriers, its workgroup's atomics
            self.last = {how: np.zeros((3, size), np.int32) for how in ("write", "read")}
        self.group_of = np.concatenate([self.group_of, w.group])

    def memory(self, w, i, how, at, size, active, values=()) -> None:
        places, wave = _bytes(w.ids + 1, at, size, active)
        if how == "atomic":
            self._order(w, at, active)
        writer = self.last["write"][:, places]
        bad = self._meets(wave, writer)
        if how == "write":
            octets = _octets(values, size)
            bad &= w.shared.memory.bytes[places] != octets
            self.report(w, i, _clash(places, wave, octets), "waves write memory in one place")
        if how != "atomic":
            told = "read" if how == "read" else "written"
            self.report(w, i, bad, f"memory that another wave wrote is {told}")
        if how == "write":
            bad = self._meets(wave, self.last["read"][:, places])
            self.report(w, i, bad, "memory that another wave read is written")
        if how == "atomic":
            return
        numbers, where = np.unique(wave, return_inverse=True)
        about = [
            (n, self.epoch[n], self.clock[g][g]) for n, g in zip(numbers, self.group_of[numbers])
        ]
        self.last[how][:, places] = np.array(about, np.int32).reshape(-1, 3)[where].T

    def _meets(self, wave: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Which accesses by `wave` nothing orders after the last ones."""
        other = (last[0] != 0) & (last[0] != wave)
        if not other.any():
            return other
        pairs = np.stack([wave, *last])[:, other]
        distinct, where = np.unique(pairs, axis=1, return_inverse=True)
        apart = [not self._ordered(*each) for each in distinct.T.tolist()]
        other[other] = np.array(apart)[where.ravel()]
        return other

    def _ordered(self, wave: int, before: int, epoch: int, atomics: int) -> bool:
        mine, other = self.group_of[wave], self.group_of[before]
        if mine == other:
            return epoch < self.epoch[wave]
        return self.clock[mine][other] > atomics

    def _order(self, w: Waves, at: np.ndarray, active) -> None:
        """Atomics: each takes over what was released at its place and releases its own."""
        for row, group in enumerate(w.group):
            mine, clock = at[row] if active is None else at[row][active[row]], self.clock[group]
            for place in np.unique(mine).tolist():
                clock |= self.released.get(place, Counter())
            clock[group] += 1
            for place in np.unique(mine).tolist():
                self.released[place] = clock.copy()

    def barrier(self, w: Waves) -> None:
        self.epoch.update((w.ids + 1).tolist())


class Alignment(_Reports):
    """LDS accesses of 8 and 16 bytes that are not aligned to their size: slower, and with the
    alignment mode of other drivers wrong."""

    kind = "alignment"

    def local(self, w, i, how, at, size, active, values=()) -> None:
        aligned = {8: 8, 16: 16}.get(size, 1)
        offset = at - w.lds_at
        bad = offset % aligned != 0
        self.report(w, i, bad if active is None else bad & active, f"{size} bytes are not aligned")


class Trace(Watch):
    """Everything through which a bit can leave a wave: addresses, stored values, branches. Runs
    that differ only in the bits that nobody set must leave the same trace."""

    def __init__(self):
        self.events: list[tuple] = []

    def _add(self, w: Waves, i: Instruction, what: str, *arrays: np.ndarray) -> None:
        content = hash(tuple(np.ascontiguousarray(each).tobytes() for each in arrays))
        self.events.append((i.address, content, what, i, w.shared.kernel))

    def memory(self, w, i, how, at, size, active, values=()) -> None:
        at = at if active is None else at[active]
        what = "a stored value" if how == "write" else "an address"
        self._add(w, i, f"{what} depends on bits that nobody set", at, *values)

    def local(self, w, i, how, at, size, active, values=()) -> None:
        at = at if active is None else at[active]
        self._add(w, i, "an LDS address depends on bits that nobody set", at)

    def branch(self, w, i, taken) -> None:
        self._add(w, i, "a branch depends on bits that nobody set", taken)

    def difference(self, other: Trace) -> list[Finding]:
        """The first event that is not the same in `other`, as a finding."""
        first = next(
            (n for n, (a, b) in enumerate(zip(self.events, other.events)) if a[:2] != b[:2]),
            min(len(self.events), len(other.events)),
        )
        longer = max(self.events, other.events, key=len)
        if first == len(longer):
            return []
        _, _, what, i, kernel = longer[first]
        return [Finding("uninitialised", what, str(i), kernel.line(i.address))]
