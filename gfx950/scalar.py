"""Scalar instructions: arithmetic on [waves], scalar loads, the mode register, branches."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .operands import TYPES, Run, scalar
from .program import EXEC, Instruction, signed
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


def _reversed(x: np.ndarray) -> np.ndarray:
    octets = np.ascontiguousarray(np.atleast_1d(x)).view(np.uint8).reshape(-1, 4)
    bits = np.unpackbits(octets, axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(U32)[:, 0]


def _first_one(x: np.ndarray) -> np.ndarray:
    """Number of the lowest set bit, -1 when there is none."""
    lowest = x & (~x + x.dtype.type(1))
    below = np.bitwise_count(lowest - x.dtype.type(1)).astype(I32)
    return np.where(x == 0, I32(-1), below).view(U32)


def _count(x: np.ndarray) -> np.ndarray:
    return np.bitwise_count(x).astype(U32)


def _overflow(total: np.ndarray) -> np.ndarray:
    return total != total.astype(I32)


# name: (types of the operands, result, SCC: "nz" for a result that is not zero, None for no change,
# else a function of the operands)
ALU: dict[str, tuple[str, Callable, str | Callable | None]] = {
    "s_mov_b32": ("u", lambda a: a, None),
    "s_mov_b64": ("U", lambda a: a, None),
    "s_not_b32": ("u", lambda a: ~a, "nz"),
    "s_not_b64": ("U", lambda a: ~a, "nz"),
    "s_brev_b32": ("u", _reversed, None),
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
    "s_mul_hi_i32": ("ii", lambda a, b: (_wide(a) * _wide(b) >> 32).astype(I32), None),
    "s_mul_hi_u32": ("uu", lambda a, b: (a.astype(U64) * b.astype(U64) >> 32).astype(U32), None),
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
}
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


def _alu(i: Instruction) -> Run:
    types, function, scc = ALU[i.name]
    reads = [scalar(i.get(f), i.literal, t) for f, t in zip(("ssrc0", "ssrc1"), types)]
    target = i.get("sdst")

    def run(w: Waves) -> None:
        values = [read(w) for read in reads]
        result = np.asarray(function(*values))
        if scc is not None:
            changed = result != 0 if scc == "nz" else scc(*values)
            w.scc = np.broadcast_to(changed, w.count)
        w.set_scalar(target, result.view(U32) if result.dtype.itemsize == 4 else result)

    return run


def _carried(i: Instruction) -> Run:
    """s_addc_u32 and s_subb_u32."""
    a, b = (scalar(i.get(f), i.literal, "u") for f in ("ssrc0", "ssrc1"))
    sign, target = -1 if i.name == "s_subb_u32" else 1, i.get("sdst")

    def run(w: Waves) -> None:
        total = _wide(a(w)) + sign * (_wide(b(w)) + w.scc)
        w.scc = np.broadcast_to((total < 0) | (total >= 1 << 32), w.count)
        w.set_scalar(target, total.astype(U32))

    return run


def _compare(i: Instruction) -> Run:
    operation, kind = re.match(r"s_cmpk?_(\w+?)_([iu]\d\d)", i.name).groups()
    kind = {"i32": "i", "u32": "u", "u64": "U"}[kind]
    if i.form.startswith("SOPK"):
        a, value = scalar(i.get("sdst"), None, kind), i.get("simm16")
        number = TYPES[kind](signed(value, 16) if kind == "i" else value)
        b = scalar(255, int(number) & 0xFFFFFFFF, kind)
    else:
        a, b = (scalar(i.get(f), i.literal, kind) for f in ("ssrc0", "ssrc1"))
    function = _COMPARE[operation]

    def run(w: Waves) -> None:
        w.scc = np.broadcast_to(function(a(w), b(w)), w.count)

    return run


def _bit_compare(i: Instruction) -> Run:
    a, b = (scalar(i.get(f), i.literal, "u") for f in ("ssrc0", "ssrc1"))
    want = int(i.name[8])

    def run(w: Waves) -> None:
        w.scc = np.broadcast_to(a(w) >> (b(w) & 31) & 1 == want, w.count)

    return run


def _set_bit(i: Instruction) -> Run:
    """s_bitset: the bit of the target that the source numbers becomes 0 or 1; others stay."""
    at, target = scalar(i.get("ssrc0"), i.literal, "u"), i.get("sdst")
    old, one = scalar(target, None, "u"), i.name[8] == "1"

    def run(w: Waves) -> None:
        bit = U32(1) << (at(w) & 31)
        w.set_scalar(target, old(w) | bit if one else old(w) & ~bit)

    return run


def _select(i: Instruction) -> Run:
    kind, target = "U" if i.name.endswith("64") else "u", i.get("sdst")
    a, b = (scalar(i.get(f), i.literal, kind) for f in ("ssrc0", "ssrc1"))
    return lambda w: w.set_scalar(target, np.where(w.scc, a(w), b(w)))


def _save_exec(i: Instruction) -> Run:
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


def _immediate(i: Instruction) -> Run:
    """s_movk, s_addk and s_mulk with a 16-bit constant."""
    number, target = I32(signed(i.get("simm16"), 16)), i.get("sdst")
    old, kind = scalar(target, None, "i"), i.name

    def run(w: Waves) -> None:
        if kind == "s_movk_i32":
            w.set_scalar(target, np.full(w.count, number).view(U32))
        elif kind == "s_mulk_i32":
            w.set_scalar(target, (old(w) * number).view(U32))
        else:
            before = old(w)
            w.scc = _overflow(_wide(before) + int(number))
            w.set_scalar(target, (before + number).view(U32))

    return run


def _set_mode(i: Instruction) -> Run:
    """s_setreg_imm32: fields of the MODE register; other hardware registers compute nothing."""
    where = i.get("simm16")
    register, offset, size = where & 63, where >> 6 & 31, (where >> 11) + 1
    mask = (1 << size) - 1 << offset
    keep, value = U32(~mask & 0xFFFFFFFF), U32(i.literal << offset & mask)

    def run(w: Waves) -> None:
        if register == 1:
            w.mode = w.mode & keep | value

    return run


def _program_counter(i: Instruction) -> Run:
    """s_getpc_b64: the address of the next instruction."""
    target, after = i.get("sdst"), U64(i.address + i.size)
    return lambda w: w.set_scalar(target, np.full(w.count, after))


def _load(i: Instruction) -> Run:
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

        w.issue(i, "scalar", deliver, w.scalar[target : target + words])

    return run


def wait_counts(i: Instruction) -> tuple[int, int]:
    """(vmcnt, lgkmcnt) of an s_waitcnt."""
    bits = i.get("simm16")
    return bits & 15 | bits >> 14 << 4, bits >> 8 & 15


_SPECIAL: list[tuple[str, Callable[[Instruction], Run]]] = [
    (r"s_(addc|subb)_u32", _carried),
    (r"s_cmpk?_(eq|lg|gt|ge|lt|le)_(i32|u32|u64)", _compare),
    (r"s_bitcmp[01]_b32", _bit_compare),
    (r"s_bitset[01]_b32", _set_bit),
    (r"s_cselect_b(32|64)", _select),
    (r"s_(and|or|xor|andn2|orn2)_saveexec_b64", _save_exec),
    (r"s_(mov|add|mul)k_i32", _immediate),
    (r"s_setreg_imm32_b32", _set_mode),
    (r"s_getpc_b64", _program_counter),
    (r"s_(buffer_)?load_dword\w*", _load),
]
NOTHING = frozenset(
    "s_nop s_setprio s_sleep s_dcache_wb s_dcache_inv s_icache_inv s_sethalt s_barrier s_endpgm"
    " buffer_inv buffer_wbl2 v_nop".split()
)
"""Instructions without effect on what is computed."""


def compile_scalar(i: Instruction) -> Run | None:
    """The instruction as a function of the waves, None when it is not known here."""
    if i.name == "s_waitcnt":
        counts = wait_counts(i)
        return lambda w: w.wait(*counts)
    if i.name in NOTHING:
        return lambda w: None
    for pattern, make in _SPECIAL:
        if re.fullmatch(pattern, i.name):
            return make(i)
    return _alu(i) if i.name in ALU else None


def branch_taken(i: Instruction) -> Callable[[Waves], np.ndarray]:
    """Which waves [waves] take a conditional branch."""
    pair = {"vcc": 106, "exec": EXEC}.get(re.match(r"s_cbranch_(vcc|exec|scc)", i.name)[1])
    if pair is None:
        want = i.name.endswith("1")
        return lambda w: w.scc == want
    zero = not i.name.endswith("nz")
    return lambda w: ((w.scalar[pair] | w.scalar[pair + 1]) == 0) == zero
