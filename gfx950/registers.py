"""Which registers an instruction reads and writes, by the operand tables of AMD's ISA and what they
leave out: carries, old values, operands that modifiers turn on."""

from __future__ import annotations

import re

from .matrix import F8F6F4
from .program import EXEC, M0, OFF, VCC, Instruction

SCALAR = 1024
"""Registers as numbers: rows of Waves.vector, and SCALAR + n for scalar register n."""
_TARGETS = {"vdst", "sdst", "sdata"}
_KEEPS_OLD = re.compile(
    r"v_(fmac_f32|cvt_pk_(fp8|bf8)_f32|cvt_scalef32_pk_(fp8|bf8|fp4)_\w+|permlane\w+swap_b32"
    r"|swap_b32|writelane_b32)|.*_d16(_hi)?$"
)
_COMPARES = re.compile(r"s_(cmpk?|bitcmp[01])_")


def name(register: int) -> str:
    """As in assembly."""
    special = {SCALAR + VCC: "vcc_lo", SCALAR + VCC + 1: "vcc_hi", SCALAR + M0: "m0"}
    special |= {SCALAR + EXEC: "exec_lo", SCALAR + EXEC + 1: "exec_hi"}
    prefix = f"s{register - SCALAR}" if register >= SCALAR else f"v{register}"
    return special.get(register, prefix)


def _span(i: Instruction, field: str, words: int, shift: int) -> range:
    """Registers that a field names; none for constants."""
    code = i.get(field)
    if code >= 256:
        return range(code - 256 + shift, code - 256 + shift + words)
    return range(SCALAR + code, SCALAR + code + words) if code < 128 and code != 125 else range(0)


def _memory_unused(i: Instruction) -> set[str]:
    """Operand fields of a memory instruction that its modifiers turn off."""
    unused = set()
    if i.form.startswith("MUBUF"):
        unused |= set() if i.get("offen") or i.get("idxen") else {"vaddr"}
        unused |= {"vdata"} if i.get("lds") else set()
    elif not i.form.startswith("DS"):
        unused |= {"saddr"} if i.get("saddr") == OFF else set()
        unused |= {"vdst"} if "_lds_" in i.name else set()
        unused |= {"addr"} if i.form.startswith("SCRATCH") and not i.get("sve") else set()
    if "atomic" in i.name and not i.get("sc0"):
        unused |= {"vdst"}
    return unused


def _words(i: Instruction, field: str, words: int) -> int:
    """Registers of an operand where its size depends on modifiers."""
    if i.name.endswith("f8f6f4") and field in ("src0", "src1"):
        return F8F6F4[i.get("cbsz" if field == "src0" else "blgp")].bits  # 32 values a lane
    if field == "vaddr" and not (i.get("offen") and i.get("idxen")):
        return 1
    return 1 if field == "addr" and i.form.startswith("GLOBAL") and i.get("saddr") != OFF else words


def _shift(i: Instruction, field: str, accumulators_at: int) -> int:
    """What is added to a register's number where it is an accumulation register."""
    if i.name.startswith("v_mfma"):
        which = {"src0": i.bit("acc", 0), "src1": i.bit("acc", 1)}
        return accumulators_at if which.get(field, i.get("acc_cd")) else 0
    if i.name.startswith("v_accvgpr"):
        plain = "src0" if "write" in i.name else "vdst" if "read" in i.name else ""
        return 0 if field == plain else accumulators_at
    data = field in ("vdst", "vdata", "data", "data0", "data1") and not i.name.startswith("v_")
    return accumulators_at if data and i.get("acc") else 0


def operand(i: Instruction, field: str, accumulators_at: int) -> set[int]:
    """Registers that an operand field names."""
    words = _words(i, field, i.operands.get(field, 1))
    return set(_span(i, field, words, _shift(i, field, accumulators_at)))


_VCC, _EXEC = ({SCALAR + n, SCALAR + n + 1} for n in (VCC, EXEC))
_IMPLICIT: tuple[tuple[str, set[int], set[int]], ...] = (
    (r"VOP2\S* v_(cndmask|addc|subb).*|\S+ v_div_fmas.*|\S+ s_cbranch_vcc.*", _VCC, set()),
    (r"VOP2\S* v_\w+_co_u32", set(), _VCC),
    (r"\S+ s_cbranch_exec.*", _EXEC, set()),
    (r"\S+ s_\w+_saveexec_b64", _EXEC, _EXEC),
    (r"\S+ \w+_load_lds_.*", {SCALAR + M0}, set()),
)
"""Form and name of instructions, and the registers that they read and write without naming them."""


def _implicit(i: Instruction) -> tuple[set[int], set[int]]:
    """(read, written) registers that no field names."""
    read, written = set(), set()
    for pattern, reads, writes in _IMPLICIT:
        if re.fullmatch(pattern, f"{i.form} {i.name}"):
            read, written = read | reads, written | writes
    if i.form.startswith("VOPC") and not i.get("sd"):
        written |= _VCC
    if i.form.startswith("MUBUF") and i.get("lds"):
        read |= {SCALAR + M0}
    return read, written


def registers(i: Instruction, accumulators_at: int) -> tuple[set[int], set[int]]:
    """(read, written) registers. EXEC, which every vector instruction reads, is left out."""
    read, written = _implicit(i)
    if i.name in ("buffer_inv", "buffer_wbl2"):
        return read, written
    unused = _memory_unused(i) if i.counter in ("vector", "local") else set()
    targets = _TARGETS | ({"vdata"} if "load" in i.name else set())
    for field in i.operands:
        field = f"v{field}" if i.has(f"v{field}") else field
        if field in unused or not i.has(field) or "simm" in field:
            continue
        if field == "soffset" and i.form.startswith("SMEM") and not i.get("soffset_en"):
            continue
        number = {"vsrc0": "s0", "vsrc1": "s1"}.get(field)
        from_scalar = number and i.has(number) and i.get(number)  # SDWA
        span = operand(i, field, accumulators_at)
        if from_scalar:
            span = range(SCALAR + i.get(field) - 256, SCALAR + i.get(field) - 255)
        elif field == "vdst" and i.name.startswith(("v_readlane", "v_readfirstlane", "v_cmp")):
            first = SCALAR + i.get(field) % 256
            span = range(first, first + (2 if i.name.startswith("v_cmp") else 1))
        compares = field == "sdst" and _COMPARES.match(i.name)
        (written if field in targets and not compares else read).update(span)
    if "atomic" in i.name and i.get("sc0") and i.has("vdata"):
        written.update(_span(i, "vdata", max(1, i.operands["vdata"] // 2), 0))
    if i.form.startswith("VOPC") and i.get("sd"):
        written.update(_span(i, "sdst", 2, 0))
    if i.name.startswith(("s_addk", "s_mulk", "s_bitset")):
        read.update(_span(i, "sdst", 1, 0))
    if "swap_b32" in i.name:
        written.update(_span(i, "src0", 1, 0))
    keeps = "DPP" in i.form and not i.get("bc") or "SDWA" in i.form and i.get("dst_unused") == 2
    if keeps or _KEEPS_OLD.fullmatch(i.name):
        read.update(each for each in written if each < SCALAR)
    return read, written
