"""One instruction at a time: assembled by the LLVM in Triton's wheel, run on waves made by hand."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from elftools.elf.elffile import ELFFile
from triton._C import libtriton

from gfx950.code_object import Kernel
from gfx950.machine import compiled
from gfx950.program import Instruction, decode_one
from gfx950.waves import LANES, Memory, Shared, Waves

ROWS = 128
"""Vector registers of `waves`, and as many accumulation registers behind them."""
KERNEL = Kernel("one", "gfx950", b"", 0, 0, registers=2 * ROWS, accumulators_at=ROWS)


def assemble_bytes(text: str, arch: str = "gfx950") -> bytes:
    """The code of `text`, an instruction a line. Raises RuntimeError with LLVM's message."""
    libtriton.llvm.init_targets()
    source = f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\n.text\n{text}\n'
    code = ELFFile(io.BytesIO(libtriton.amd.assemble_amdgcn(source, arch, "")))
    return code.get_section_by_name(".text").data()


@cache
def assemble(text: str, arch: str = "gfx950") -> tuple[Instruction, ...]:
    """The instructions of `text`."""
    raw, found, at = assemble_bytes(text, arch), [], 0
    while at < len(raw):
        found.append(decode_one(raw[at : at + 16], at))
        at += found[-1].size
    return tuple(found)


def waves(count: int = 1, seed: int = 0, lds: int = 4096, memory: Memory | None = None) -> Waves:
    """Waves with random bits in all registers and LDS, all lanes active; scratch is 64 bytes."""
    random = np.random.default_rng(seed)
    scalar = random.integers(0, 2**32, (128, count), np.uint32)
    scalar[126:128] = 0xFFFFFFFF
    return Waves(
        vector=random.integers(0, 2**32, (2 * ROWS, count, LANES), np.uint32),
        scalar=scalar,
        scc=random.integers(0, 2, count).astype(bool),
        mode=np.full(count, 0xF0, np.uint32),
        ids=np.arange(count),
        slot=np.arange(count),
        group=np.zeros(count, int),
        lds_at=np.zeros((count, 1), np.int64),
        shared=Shared(
            kernel=KERNEL,
            memory=memory or Memory(1 << 16),
            lds=random.integers(0, 256, lds, np.uint8),
            lds_size=lds,
            scratch=random.integers(0, 256, count * LANES * 64, np.uint8),
            scratch_size=64,
        ),
    )


def run(text: str, w: Waves, arch: str = "gfx950") -> Waves:
    """Executes the instructions of `text` on `w`."""
    kernel = KERNEL if arch == "gfx950" else Kernel("one", arch, b"", 0, 0, registers=2 * ROWS)
    with np.errstate(all="ignore"):
        for i in assemble(text, arch):
            compiled(i, kernel)(w)
    return w


def spread(values: np.ndarray) -> np.ndarray:
    """Values as uint32 registers [waves, 64], the last wave filled up with 0."""
    flat = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").astype(np.uint32)
    return np.pad(flat, (0, -len(flat) % LANES)).reshape(-1, LANES)
