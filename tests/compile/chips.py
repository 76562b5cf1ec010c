"""What the compile gate knows of each chip: its compiler target, its limits and its matrix
instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Chip:
    """One compiler target. Sizes are bytes of a compute unit (an SM on NVIDIA)."""

    arch: str
    target: GPUTarget
    compute_units: int
    local_memory: int
    """LDS that one workgroup may take, which is all of a compute unit's."""
    local_memory_grain: int = 512
    shared_per_unit: int = 0
    """All of an SM's shared memory, of which each workgroup also takes 1 KiB for itself."""

    @property
    def is_amd(self) -> bool:
        return self.target.backend == "hip"


CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("gfx950", GPUTarget("hip", "gfx950", 64), 256, 160 << 10, 1280),
        Chip("gfx942", GPUTarget("hip", "gfx942", 64), 304, 64 << 10, 512),
        Chip("sm_90", GPUTarget("cuda", 90, 32), 132, 227 << 10, 1024, 228 << 10),
    )
}

LDS_BYTES_A_CLOCK = 128
"""That a compute unit's local memory hands out, shared by its four SIMDs (CDNA4's read rate is not
confirmed)."""
SIMDS = 4
VECTOR_REGISTERS = 512
"""Of one SIMD lane, accumulation registers included; given to a wave in granules of 8."""
WAVES_PER_SIMD = 8


@dataclass(frozen=True)
class Matrix:
    """A matrix instruction of one wave: its multiply-adds, its clocks, and what rate that is."""

    macs: int
    clocks: int
    rate: str


_MATRIX = [
    (re.compile(pattern), Matrix(macs, clocks, rate))
    for pattern, macs, clocks, rate in (
        # CDNA4 and CDNA3 instruction set manuals, MFMA pass counts (a pass is 4 clocks). "half
        # rate" on gfx950 is full rate on gfx942, which has nothing wider.
        (r"v_mfma_scale_f32_32x32x64_f8f6f4", 65536, 64, "scaled f8f6f4"),
        (r"v_mfma_scale_f32_16x16x128_f8f6f4", 32768, 32, "scaled f8f6f4"),
        (r"v_mfma_f32_32x32x64_f8f6f4", 65536, 64, "f8f6f4"),
        (r"v_mfma_f32_16x16x128_f8f6f4", 32768, 32, "f8f6f4"),
        (r"v_mfma_f32_32x32x16_(bf16|f16)", 16384, 32, "16-bit"),
        (r"v_mfma_f32_16x16x32_(bf16|f16)", 8192, 16, "16-bit"),
        (r"v_mfma_f32_32x32x8_?(bf16|f16)\w*", 8192, 32, "16-bit half rate"),
        (r"v_mfma_f32_16x16x16_?(bf16|f16)\w*", 4096, 16, "16-bit half rate"),
        (r"v_mfma_f32_32x32x16_(fp8|bf8)\w*", 16384, 32, "8-bit half rate"),
        (r"v_mfma_f32_16x16x32_(fp8|bf8)\w*", 8192, 16, "8-bit half rate"),
        (r"v_mfma_f32_32x32x2_?f32", 2048, 64, "f32"),
        (r"v_mfma_f32_16x16x4_?f32", 1024, 32, "f32"),
    )
]


def matrix_instruction(mnemonic: str) -> Matrix | None:
    """What an AMD mnemonic multiplies, None when it is not a matrix instruction. Raises KeyError
    for an unknown one."""
    name = re.sub(r"_e64$", "", mnemonic)
    if not name.startswith(("v_mfma", "v_smfmac")):
        return None
    for pattern, matrix in _MATRIX:
        if pattern.fullmatch(name):
            return matrix
    raise KeyError(f"{mnemonic} is not in the table of matrix instructions")


_NARROW = re.compile(r"cbsz:[2-4]\b.*blgp:[2-4]\b")


def unpriced_cycles(line: str) -> int:
    """Cycles of 4 clocks that an instruction takes beside what llvm-mca 22 says: it gives every
    f8f6f4 product the time of FP6 and FP4 operands, but one of FP8 makes it twice as long."""
    name = line.split()[0]
    if "f8f6f4" not in name or _NARROW.search(line):
        return 0
    return 8 if "32x32x64" in name else 4
