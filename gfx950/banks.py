"""LDS bank conflicts, from the addresses of each access.

LDS serves the lanes of a wave in phases. In a phase each bank, 4 bytes wide, gives or takes one
word a cycle, for all lanes at that word; every further word of the same bank is a cycle more. AMD
does not publish which lanes make a phase. Here are those measured on an MI355X (b64, b96 and b128:
HipKittens, arXiv 2511.08083, table 5); for the rest Triton's rule, by which it lays out LDS
(composePaddedLayoutForAsyncCopyCDNA4): 32 banks and as many neighbouring lanes as fill them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from .program import Instruction
from .waves import LANES, Watch, Waves

_QUADS = {16: ((0, 3, 5, 6), (1, 2, 4, 7)), 12: ((0, 5), (1, 4), (2, 7), (3, 6))}
"""Groups of 4 lanes in each phase of the first 32 lanes, of wide reads; the other 32 follow."""


@cache
def phases(reads: bool, pair: bool, size: int) -> tuple[np.ndarray, int]:
    """(lanes [phase, lane], banks) of an access of `size` bytes a lane; `pair`: one of two of a
    read2 or write2."""
    banks = 64 if reads and not pair and size in (8, 16) else 32
    if reads and size in _QUADS:
        lanes = np.array(_QUADS[size])[..., None] * 4 + np.arange(4)
        half = lanes.reshape(len(lanes), -1)
        return np.concatenate([half, half + 32]), banks
    together = {1: 32, 2: 16, 3: 8, 4: 8}[max(size // 4, 1)] * banks // 32  # all banks, once
    return np.arange(LANES).reshape(-1, together), banks


def conflicts(
    at: np.ndarray, active: np.ndarray, size: int, lanes: np.ndarray, banks: int, alone: bool
) -> int:
    """Cycles beyond one a phase that accesses at `at` [waves, 64] take. `alone`: a bank serves each
    lane on its own, as it must an atomic."""
    words = (at >> 2)[:, lanes][..., None] + np.arange(max(size // 4, 1))
    words = np.where(active[:, lanes][..., None], words, -1)
    words = np.sort(words.reshape(len(at) * len(lanes), -1), axis=1)  # [phase, word]
    asks = words >= 0
    if not alone:
        asks[:, 1:] &= words[:, 1:] != words[:, :-1]
    phase, column = np.nonzero(asks)
    asked = np.bincount(phase * banks + words[phase, column] % banks, minlength=len(words) * banks)
    return int(np.maximum(asked.reshape(-1, banks).max(axis=1) - 1, 0).sum())


@dataclass
class BankConflicts(Watch):
    """Counts of a launch on a gfx950. Lanes that exchange values (ds_bpermute and its like) touch
    no bank, and loads into LDS are counted as writes of consecutive lanes, as they are."""

    accesses: int = 0
    """Of all waves; read2 and write2 are two."""
    bytes: int = 0
    """Of active lanes."""
    phases: int = 0
    """Cycles without conflicts."""
    conflicts: int = 0
    """Cycles more."""

    def begin(self, w: Waves) -> None:
        if w.shared.kernel.arch != "gfx950":
            raise ValueError(
                f"bank conflicts of {w.shared.kernel.arch} are not known, only those of gfx950;"
                " leave BankConflicts out of the watches"
            )

    def local(self, w: Waves, i: Instruction, how: str, at, size: int, active, values=()) -> None:
        active = np.ones(at.shape, bool) if active is None else active
        pair = i.name.startswith(("ds_read2", "ds_write2"))
        lanes, banks = phases(how == "read", pair, size)
        self.accesses += w.count
        self.bytes += size * int(active.sum())
        self.phases += len(lanes) * w.count
        self.conflicts += conflicts(at, active, size, lanes, banks, how == "atomic")
