"""Scalar instructions: arithmetic on [waves], scalar loads, the mode register, branches."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .code_object import Kernel
from .operands import Kinds, Read, Run, scalar
from .program import EXEC, Instruction, signed
from .vector import mul_high, reversed_bits
from .waves import I64, U32, U64, Fault, Waves

I32 = np.int32


def _wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(I64)


def _field(x: np.ndarray, where: np.ndarray) -> np.ndarray:
    """s_bfe: the bits of `x` from `where`'s low bits on, as many as its bits 16 to 22 say; signed
    when x is."""
    bits = 8 * x.dtype.itemsize
    x, where = np.broadcast_arrays(x, where)
    fields = []
    for value, at in zip(x.tolist(), where.tolist()):
        width = at >> 16 & 0x7F
        found = value >> (at & bits - 1) & (1 << width) - 1
        negative = x.dtype.kind == "i" and 0 < width < bits and found >> width - 1
        fields.append((found - (1 << width) if negative else found) & (1 << bits) - 1)
    return np.array(fields, f"u{bits // 8}").view(x.dtype)


def _first_one(x: np.ndarray) -> np.ndarray:
    """Number of the lowest set bit, -1 when there is none."""
    lowest = x & (~x + x.dtype.type(1))
    below = np.bitwise_count(lowest - x.dtype.type(1)).astype(I32)
    return np.where(x == 0, I32(-1), below).view(U32)


def _count(x: np.ndarray) -> np.ndarray:
    return np.bitwise_count(x).astype(U32)


def _overflow(total: np.ndarray) -> np.ndarray:
    return total != total.astype(I32)


ALU: dict[str, tuple[str, Callable | None, str | Callable | None]] = {
    "s_mov_b32": ("u", lambda a: a, None),
    "s_mov_b64": ("U", lambda a: a, None),
    "s_not_b32": ("u", lambda a: ~a, "nz"),
    "s_not_b64": ("U", lambda a: ~a, "nz"),
    "s_brev_b32": ("u", reversed_bits, None),
    "s_abs_i32": ("i", np.abs, "nz"),
    "s_bcnt1_i32_b32": ("u", _count, "nz"),
    "s_bcnt1_i32_b64": ("U", _count, "nz"),
    "s_ff1_i32_b32": ("u", _first_one, None),
    "s_ff1_i32_b64": ("U", _first_one, None),
    "s_sext_i32_i8": ("u", lambda a: a.astype(np.int8).astype(I32), None),
    "s_sext_i32_i16": ("u", lambda a: a.astype(np.int16).astype(I32), None),
    "s_add_u32": ("uu", lambda a, b: a + b, lambda a, b: _wide(a) + _wide(b) >= 1 << 32),
    "s_sub_u32": ("uu", lambda a, b: a - b, lambda a, b: b > a),
    "s_add_i32": ("ii", lambda a, b: a + b, lambda a, b: _overflow(_wide(a) + _wide(b))),
    "s_sub_i32": ("ii", lambda a, b: a - b, lambda a, b: _overflow(_wide(a) - _wide(b))),
    "s_mul_i32": ("ii", lambda a, b: a * b, None),
    "s_mul_hi_i32": ("ii", mul_high, None),
    "s_mul_hi_u32": ("uu", mul_high, None),
    "s_lshl_b32": ("uu", lambda a, b: a << (b & 31), "nz"),
    "s_lshr_b32": ("uu", lambda a, b: a >> (b & 31), "nz"),
    "s_ashr_i32": ("iu", lambda a, b: a >> (b & 31).astype(I32), "nz"),
    "s_lshl_b64": ("Uu", lambda a, b: a << (b & 63).astype(U64), "nz"),
    "s_lshr_b64": ("Uu", lambda a, b: a >> (b & 63).astype(U64), "nz"),
    "s_ashr_i64": ("Iu", lambda a, b: a >> (b & 63).astype(I64), "nz"),
    "s_bfe_u32": ("uu", _field, "nz"),
    "s_bfe_i32": ("iu", _field, "nz"),
    "s_bfe_u64": ("Uu", _field, "nz"),
    "s_bfm_b32": ("uu", lambda a, b: ((U32(1) << (a & 31)) - U32(1)) << (b & 31), None),
    "s_min_i32": ("ii", np.minimum, np.less),
    "s_max_i32": ("ii", np.maximum, np.greater_equal),
    "s_min_u32": ("uu", np.minimum, np.less),
    "s_max_u32": ("uu", np.maximum, np.greater_equal),
    "s_pack_ll_b32_b16": ("uu", lambda a, b: a & 0xFFFF | b << 16, None),
    "s_pack_lh_b32_b16": ("uu", lambda a, b: a & 0xFFFF | b & 0xFFFF0000, None),
    "s_pack_hh_b32_b16": ("uu", lambda a, b: a >> 16 | b & 0xFFFF0000, None),
    "s_addc_u32": ("uuc", lambda a, b, c: a + b + c, lambda a, b, c: _wide(a) + b + c >= 1 << 32),
    "s_subb_u32": ("uuc", lambda a, b, c: a - b - c, lambda a, b, c: _wide(b) + c > a),
    "s_cselect_b32": ("uuc", lambda a, b, c: np.where(c, a, b), None),
    "s_cselect_b64": ("UUc", lambda a, b, c: np.where(c, a, b), None),
    "s_bitset0_b32": ("u:u", lambda a, old: old & ~(U32(1) << (a & 31)), None),
    "s_bitset1_b32": ("u:u", lambda a, old: old | U32(1) << (a & 31), None),
    "s_bitcmp0_b32": ("uu", None, lambda a, b: a >> (b & 31) & 1 == 0),
    "s_bitcmp1_b32": ("uu", None, lambda a, b: a >> (b & 31) & 1 == 1),
    "s_movk_i32": ("k", lambda k: k, None),
    "s_addk_i32": ("k:i", lambda k, old: old + k, lambda k, old: _overflow(_wide(old) + k)),
    "s_mulk_i32": ("k:i", lambda k, old: old * k, None),
}
"""name: (operands, result (None: only SCC), SCC: "nz" for a result that is not zero, None for no
change, else a function of the operands). Operands are types of operands.TYPES; c is SCC, k and K
are the 16-bit constant with sign and without, and one behind ":" is the target's old value."""
_LOGIC = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
for _name, _function in _LOGIC.items():
    ALU[f"s_{_name}_b32"] = ("uu", _function, "nz")
    ALU[f"s_{_name}_b64"] = ("UU", _function, "nz")
for _n in range(1, 5):
    ALU[f"s_lshl{_n}_add_u32"] = (
        "uu",
        lambda a, b, n=_n: (a << n) + b,
        lambda a, b, n=_n: (_wide(a) << n) + _wide(b) >= 1 << 32,
    )
_COMPARE = {
    "eq": np.equal,
    "lg": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
}
for _name, _function in _COMPARE.items():
    for _kind in "iu":
        ALU[f"s_cmp_{_name}_{_kind}32"] = (_kind * 2, None, _function)
        ALU[f"s_cmpk_{_name}_{_kind}32"] = ({"i": "ik", "u": "uK"}[_kind], None, _function)
for _name in ("eq", "lg"):
    ALU[f"s_cmp_{_name}_u64"] = ("UU", None, _COMPARE[_name])


def _operands(i: Instruction, types: str) -> list[Read]:
    """Readers of the operands that a row of ALU names."""
    types, _, old = types.partition(":")
    fields = iter(("ssrc0", "ssrc1") if i.has("ssrc0") else ("sdst",))
    constant = i.get("simm16")
    special: dict[str, Read] = {
        "c": lambda w: w.scc,
        "k": lambda w: I32(signed(constant, 16)),
        "K": lambda w: U32(constant),
    }
    reads = [special.get(t) or scalar(i.get(next(fields)), i.literal, t) for t in types]
    return reads + [scalar(i.get("sdst"), None, t) for t in old]


def _alu(i: Instruction, kernel: Kernel) -> Run:
    types, function, scc = ALU[i.name]
    reads, target = _operands(i, types), i.get("sdst")

    def run(w: Waves) -> None:
        values = [read(w) for read in reads]
        result = np.asarray(function(*values)) if function else None
        if scc is not None:
            changed = result != 0 if scc == "nz" else scc(*values)
            w.scc = np.broadcast_to(changed, w.count)
        if function:
            w.set_scalar(target, result.view(U32) if result.dtype.itemsize == 4 else result)

    return run


def _save_exec(i: Instruction, kernel: Kernel) -> Run:
    """sdst = EXEC; EXEC = source, operation, EXEC."""
    function = _LOGIC[re.match(r"s_(\w+)_saveexec", i.name)[1]]
    source, old = scalar(i.get("ssrc0"), i.literal, "U"), scalar(EXEC, None, "U")
    target = i.get("sdst")

    def run(w: Waves) -> None:
        before, given = old(w), source(w)
        after = np.broadcast_to(function(given, before), w.count)
        w.set_scalar(target, before)
        w.scc = after != 0
        w.set_scalar(EXEC, after)

    return run


def _set_mode(i: Instruction, kernel: Kernel) -> Run:
    """s_setreg_imm32: fields of the MODE register; other hardware registers compute nothing."""
    where = i.get("simm16")
    register, offset, size = where & 63, where >> 6 & 31, (where >> 11) + 1
    mask = (1 << size) - 1 << offset
    keep, value = U32(~mask & 0xFFFFFFFF), U32(i.literal << offset & mask)

    def run(w: Waves) -> None:
        if register == 1:
            w.mode = w.mode & keep | value

    return run


def _program_counter(i: Instruction, kernel: Kernel) -> Run:
    """s_getpc_b64: the address of the next instruction."""
    target, after = i.get("sdst"), U64(i.address + i.size)
    return lambda w: w.set_scalar(target, np.full(w.count, after))


def _load(i: Instruction, kernel: Kernel) -> Run:
    words = int(re.search(r"dwordx?(\d*)", i.name)[1] or 1)
    base, target = scalar(i.get("sbase"), None, "U"), i.get("sdata")
    limit = scalar(i.get("sbase") + 2, None, "u") if i.name.startswith("s_buffer") else None
    step = U64(signed(i.get("offset"), 21) & (1 << 64) - 1)
    more = scalar(i.get("soffset"), None, "u") if i.get("soffset_en") else None

    def run(w: Waves) -> None:
        start = base(w) if limit is None else base(w) & U64((1 << 48) - 1)
        address = start + step + (more(w).astype(U64) if more else U64(0))
        if limit and (address - start + U64(4 * words) > limit(w)).any():
            raise Fault("scalar load past the end of its buffer")
        place = w.shared.memory.places(address, 4 * words, None)
        for each in w.shared.watches:
            each.memory(w, i, "read", place[:, None], 4 * words, np.ones((w.count, 1), bool))
        values = w.shared.memory.words[(place >> 2)[None, :] + np.arange(words)[:, None]]

        def deliver() -> None:
            w.scalar[target : target + words] = values
            w.masks.clear()

        w.issue(i, deliver, w.scalar[target : target + words])

    return run


def wait_counts(i: Instruction) -> tuple[int, int]:
    """(vmcnt, lgkmcnt) of an s_waitcnt."""
    bits = i.get("simm16")
    return bits & 15 | bits >> 14 << 4, bits >> 8 & 15


def _wait(i: Instruction, kernel: Kernel) -> Run:
    counts = wait_counts(i)
    return lambda w: w.wait(*counts)


def _nothing(i: Instruction, kernel: Kernel) -> Run:
    """Without effect on what is computed."""
    return lambda w: None


SCALAR: Kinds = [
    (r"s_waitcnt", _wait),
    (r"s_nop|s_setprio|s_sleep|s_sethalt|s_barrier|s_endpgm|v_nop", _nothing),
    (r"s_[di]cache_(wb|inv)|buffer_(inv|wbl2)", _nothing),
    (r"s_(and|or|xor|andn2|orn2)_saveexec_b64", _save_exec),
    (r"s_setreg_imm32_b32", _set_mode),
    (r"s_getpc_b64", _program_counter),
    (r"s_(buffer_)?load_dword\w*", _load),
    ("|".join(ALU), _alu),
]


def branch_taken(i: Instruction) -> Callable[[Waves], np.ndarray]:
    """Which waves [waves] take a conditional branch."""
    pair = {"vcc": 106, "exec": EXEC}.get(re.match(r"s_cbranch_(vcc|exec|scc)", i.name)[1])
    if pair is None:
        want = i.name.endswith("1")
        return lambda w: w.scc == want
    zero = not i.name.endswith("nz")
    return lambda w: ((w.scalar[pair] | w.scalar[pair + 1]) == 0) == zero
