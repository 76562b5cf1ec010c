"""Vector instructions whose lanes are independent, as functions of typed arrays [waves, 64]
(CDNA4 ISA, "Vector ALU Operations")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import floats
from .code_object import Kernel
from .convert import PLAIN_CONVERSIONS
from .operands import Kinds, Read, Run, destination, raw_vector, sources, vector, with_sign
from .program import VCC, Instruction
from .waves import F32, I64, U16, U32, U64, Waves

I32 = np.int32


def _shift(operate: Callable) -> Callable:
    """A shift of the second operand by the low bits of the first."""
    return lambda count, x: operate(
        x, np.asarray(count).astype(x.dtype) & x.dtype.type(8 * x.dtype.itemsize - 1)
    )


def _u64(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(U64)


def _i64(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(I64)


def _carried(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low 32 bits, whether there are more) of a sum or difference."""
    return total.astype(U32), (total < 0) | (total >= 1 << 32)


def _field(x: np.ndarray, offset: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Bits of `x`, signed when x is; a width of 0 gives 0."""
    offset, width = (_i64(n) & 31 for n in (offset, width))
    found = x.astype(I64) >> offset & (1 << width) - 1
    if x.dtype == I32:
        found = found - ((found >> np.maximum(width - 1, 0) & 1) << width)
    return found.astype(x.dtype)


def reversed_bits(x: np.ndarray) -> np.ndarray:
    for step, keep in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        x = x >> step & keep | (x & keep) << step
    return x >> 16 | x << 16


def _leading(x: np.ndarray) -> np.ndarray:
    """Zeros before the highest one; -1 when there is none."""
    zeros = (32 - np.frexp(x.astype(np.float64))[1]).astype(U32)
    return np.where(x == 0, U32(0xFFFFFFFF), zeros)


def _permuted(a: np.ndarray, b: np.ndarray, select: np.ndarray) -> np.ndarray:
    """v_perm_b32: each byte of `select` picks one of the 8 bytes of a:b, a sign or a constant."""
    source, result = _u64(a) << 32 | _u64(b), U32(0)
    for byte in range(4):
        pick = np.asarray(select) >> 8 * byte & 0xFF
        value = source >> _u64(pick & 7) * 8 & 0xFF
        sign = (source >> _u64(pick - 8 & 3) * 16 + 15 & 1) * 0xFF
        fixed = np.where(pick == 12, U64(0), U64(0xFF))
        value = np.where(pick < 8, value, np.where(pick < 12, sign, fixed))
        result = result | value.astype(U32) << 8 * byte
    return result


def mul_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = I64 if a.dtype == I32 else U64
    return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)


def _class(x: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """v_cmp_class: whether x is of one of the kinds whose bits are set: signalling and quiet NaN,
    then -infinity, -normal, -subnormal, -0, 0, subnormal, normal, infinity."""
    bits = x.view(U32)
    exponent, low, negative = bits >> 23 & 255, bits & 0x7FFFFF, bits >> 31 == 1
    finite = np.where(exponent > 0, 2, np.where(low > 0, 1, 0))
    size = np.where((exponent == 255) & (low == 0), 3, finite)
    kind = np.where(negative, 5 - size, 6 + size)
    kind = np.where((exponent == 255) & (low > 0), low >> 22, kind)
    return np.asarray(wanted) >> kind.astype(U32) & 1 == 1


def _exponent(x: np.ndarray) -> np.ndarray:
    return (np.asarray(x).view(U32) >> 23 & 255).astype(I32)


def _div_fixup(quotient: np.ndarray, d: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The end of a division: the sign, and what d or n of 0, infinity or NaN make of it."""
    value = np.where(_exponent(n) - _exponent(d) < -150, F32(0), np.abs(quotient))
    value = np.where(np.isinf(d) | (n == 0), F32(0), value)
    value = np.where((d == 0) | np.isinf(n), F32(np.inf), value)
    nothing = ((d == 0) & (n == 0)) | (np.isinf(d) & np.isinf(n))
    value = np.where(nothing, F32(np.nan), value)
    value = np.where(np.signbit(d) ^ np.signbit(n), -value, value)
    return np.where(np.isnan(n), n, np.where(np.isnan(d), d, value)).astype(F32)


def _div_scale(s: np.ndarray, d: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v_div_scale_f32: operand `s`, which is d or n, scaled so that the quotient neither over- nor
    underflows on the way; and whether v_div_fmas must scale back."""
    s, d, n = np.broadcast_arrays(s, d, n)
    wide = d.astype(np.float64)
    reciprocal = np.abs(1 / wide) < 2.0**-126  # d so large that 1/d is no normal float32
    quotient = np.abs(n.astype(np.float64) / wide)
    small = (quotient < 2.0**-126) & (quotient != 0)
    up, down = s * F32(2.0**64), s * F32(2.0**-64)
    cases = [
        ((n == 0) | (d == 0), np.full_like(s, np.nan), False),
        (_exponent(n) - _exponent(d) >= 96, np.where(s == d, up, s), True),
        ((np.abs(d) < 2.0**-126) & (d != 0), up, False),
        (reciprocal & small, np.where(s == d, down, s), True),
        (reciprocal, down, False),
        (small, np.where(s == n, up, s), True),
        (_exponent(n) <= 23, up, False),
    ]
    conditions, values, back = zip(*cases)
    return (
        np.select(conditions, values, s).astype(F32),
        np.select(conditions, [np.full(s.shape, flag) for flag in back], False),
    )


def _div_fmas(a: np.ndarray, b: np.ndarray, c: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """AMD's text says 2^32; only 2^64, away from the exponent's middle, undoes v_div_scale."""
    value = _fma(a, b, c)
    return np.where(scale, value * np.where(_exponent(c) > 127, F32(2.0**64), F32(2.0**-64)), value)


def _transcendental(function: Callable) -> Callable:
    """Subnormals are zeros on the way in and out."""
    return lambda x: floats.flush(function(floats.flush(x)).astype(F32))


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return floats.fma(*np.broadcast_arrays(a, b, c))


def _median3(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The middle one; with a NaN among them the least of the others."""
    middle = np.fmax(np.fmin(a, b), np.fmin(np.fmax(a, b), c))
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(nan, np.fmin(np.fmin(a, b), c), middle)


def _turns(function: Callable) -> Callable:
    """v_sin and v_cos: of a number of turns."""
    return _transcendental(lambda x: function(2 * np.pi * x.astype(np.float64)))


_reciprocal = _transcendental(lambda x: 1 / x)
_LOW24 = 0xFFFFFF

SIMPLE: dict[str, tuple[str, Callable]] = {
    **PLAIN_CONVERSIONS,
    "v_mov_b32": ("u", lambda a: a),
    "v_mov_b64": ("U", lambda a: a),
    "v_not_b32": ("u", lambda a: ~a),
    "v_bfrev_b32": ("u", reversed_bits),
    "v_ffbh_u32": ("u", _leading),
    "v_add_f32": ("ff", lambda a, b: a + b),
    "v_sub_f32": ("ff", lambda a, b: a - b),
    "v_subrev_f32": ("ff", lambda a, b: b - a),
    "v_mul_f32": ("ff", lambda a, b: a * b),
    "v_max_f32": ("ff", np.fmax),
    "v_min_f32": ("ff", np.fmin),
    "v_max3_f32": ("fff", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    "v_min3_f32": ("fff", lambda a, b, c: np.fmin(np.fmin(a, b), c)),
    "v_med3_f32": ("fff", _median3),
    "v_maximum3_f32": ("fff", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_minimum3_f32": ("fff", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_fma_f32": ("fff", _fma),
    "v_fmac_f32": ("ff:f", _fma),
    "v_fmamk_f32": ("fff", _fma),
    "v_fmaak_f32": ("fff", _fma),
    "v_exp_f32": ("f", _transcendental(np.exp2)),
    "v_log_f32": ("f", _transcendental(np.log2)),
    "v_rcp_f32": ("f", _reciprocal),
    "v_rcp_iflag_f32": ("f", _reciprocal),
    "v_rsq_f32": ("f", _transcendental(lambda x: 1 / np.sqrt(x.astype(np.float64)))),
    "v_sqrt_f32": ("f", _transcendental(np.sqrt)),
    "v_sin_f32": ("f", _turns(np.sin)),
    "v_cos_f32": ("f", _turns(np.cos)),
    "v_trunc_f32": ("f", np.trunc),
    "v_floor_f32": ("f", np.floor),
    "v_ceil_f32": ("f", np.ceil),
    "v_rndne_f32": ("f", np.rint),
    "v_fract_f32": ("f", lambda a: a - np.floor(a)),
    "v_ldexp_f32": (
        "fi",
        lambda a, b: np.ldexp(a.astype(np.float64), np.clip(b, -999, 999)).astype(F32),
    ),
    "v_div_fixup_f32": ("fff", _div_fixup),
    "v_cmp_class_f32": ("fu", _class),
    "v_add_u32": ("uu", lambda a, b: a + b),
    "v_sub_u32": ("uu", lambda a, b: a - b),
    "v_subrev_u32": ("uu", lambda a, b: b - a),
    "v_add_u16": ("ss", lambda a, b: a + b),
    "v_sub_u16": ("ss", lambda a, b: a - b),
    "v_mul_lo_u16": ("ss", lambda a, b: a * b),
    "v_add3_u32": ("uuu", lambda a, b, c: a + b + c),
    "v_add_lshl_u32": ("uuu", lambda a, b, c: a + b << (c & 31)),
    "v_lshl_add_u32": ("uuu", lambda a, b, c: (a << (b & 31)) + c),
    "v_lshl_add_u64": ("UuU", lambda a, b, c: (a << _u64(b & 7)) + c),
    "v_lshl_or_b32": ("uuu", lambda a, b, c: a << (b & 31) | c),
    "v_and_or_b32": ("uuu", lambda a, b, c: a & b | c),
    "v_or3_b32": ("uuu", lambda a, b, c: a | b | c),
    "v_xad_u32": ("uuu", lambda a, b, c: (a ^ b) + c),
    "v_and_b32": ("uu", lambda a, b: a & b),
    "v_or_b32": ("uu", lambda a, b: a | b),
    "v_xor_b32": ("uu", lambda a, b: a ^ b),
    "v_xnor_b32": ("uu", lambda a, b: ~(a ^ b)),
    "v_lshlrev_b32": ("uu", _shift(np.left_shift)),
    "v_lshrrev_b32": ("uu", _shift(np.right_shift)),
    "v_ashrrev_i32": ("ui", _shift(np.right_shift)),
    "v_lshlrev_b64": ("uU", _shift(np.left_shift)),
    "v_lshrrev_b64": ("uU", _shift(np.right_shift)),
    "v_ashrrev_i64": ("uI", _shift(np.right_shift)),
    "v_lshlrev_b16": ("ss", _shift(np.left_shift)),
    "v_lshrrev_b16": ("ss", _shift(np.right_shift)),
    "v_ashrrev_i16": ("st", _shift(np.right_shift)),
    "v_bfe_u32": ("uuu", _field),
    "v_bfe_i32": ("iuu", _field),
    "v_bfi_b32": ("uuu", lambda a, b, c: a & b | ~a & c),
    "v_alignbit_b32": (
        "uuu",
        lambda a, b, c: ((_u64(a) << 32 | _u64(b)) >> _u64(c & 31)).astype(U32),
    ),
    "v_perm_b32": ("uuu", _permuted),
    "v_bcnt_u32_b32": ("uu", lambda a, b: np.bitwise_count(a).astype(U32) + b),
    "v_mul_lo_u32": ("uu", lambda a, b: a * b),
    "v_mul_hi_u32": ("uu", mul_high),
    "v_mul_hi_i32": ("ii", mul_high),
    "v_mul_u32_u24": ("uu", lambda a, b: (a & _LOW24) * (b & _LOW24)),
    "v_mul_hi_u32_u24": ("uu", lambda a, b: mul_high(a & _LOW24, b & _LOW24)),
    "v_mad_u32_u24": ("uuu", lambda a, b, c: (a & _LOW24) * (b & _LOW24) + c),
    "v_min_i32": ("ii", np.minimum),
    "v_max_i32": ("ii", np.maximum),
    "v_min_u32": ("uu", np.minimum),
    "v_max_u32": ("uu", np.maximum),
    "v_min3_u32": ("uuu", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_max3_u32": ("uuu", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_min3_i32": ("iii", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_max3_i32": ("iii", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_add_f16": ("hh", lambda a, b: a + b),
    "v_mul_f16": ("hh", lambda a, b: a * b),
    "v_max_f16": ("hh", np.fmax),
    "v_pack_b32_f16": ("ss", lambda a, b: a.astype(U32) | b.astype(U32) << 16),
    "v_mad_u64_u32": ("uuU", lambda a, b, c: _u64(a) * b + c),
    "v_mad_i64_i32": ("iiI", lambda a, b, c: _i64(a) * b + c),
    "v_cndmask_b32": ("ffm", lambda a, b, mask: np.where(mask, b, a)),
    "v_div_fmas_f32": ("fffm", _div_fmas),
}
"""name: (operands, result). Operands are types of operands.TYPES; m is the mask in VCC or in the
pair that src2 names, and one behind ":" is the target's old value."""
WITH_MASK: dict[str, tuple[str, Callable]] = {
    "v_add_co_u32": ("uu", lambda a, b: _carried(_i64(a) + b)),
    "v_sub_co_u32": ("uu", lambda a, b: _carried(_i64(a) - b)),
    "v_subrev_co_u32": ("uu", lambda a, b: _carried(_i64(b) - a)),
    "v_addc_co_u32": ("uum", lambda a, b, carry: _carried(_i64(a) + b + carry)),
    "v_subb_co_u32": ("uum", lambda a, b, carry: _carried(_i64(a) - b - carry)),
    "v_subbrev_co_u32": ("uum", lambda a, b, carry: _carried(_i64(b) - a - carry)),
    "v_div_scale_f32": ("fff", _div_scale),
}
"""The same for instructions that also give a mask, into VCC or the pair that they name."""
PACKED: dict[str, tuple[str, Callable]] = {
    "v_pk_fma_f32": ("fff", _fma),
    "v_pk_mul_f32": ("ff", np.multiply),
    "v_pk_add_f32": ("ff", np.add),
    "v_pk_lshlrev_b16": ("ss", _shift(np.left_shift)),
    "v_pk_lshrrev_b16": ("ss", _shift(np.right_shift)),
    "v_pk_ashrrev_i16": ("tt", _shift(np.right_shift)),
    "v_pk_add_u16": ("ss", np.add),
    "v_pk_mul_lo_u16": ("ss", np.multiply),
    "v_pk_max_i16": ("tt", np.maximum),
    "v_pk_min_i16": ("tt", np.minimum),
    "v_pk_add_f16": ("hh", np.add),
    "v_pk_mul_f16": ("hh", np.multiply),
    "v_pk_max_f16": ("hh", np.fmax),
}
"""The same for instructions that do it twice: on the registers of pairs, or on halves of one."""
_COMPARE = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ne": np.not_equal,
    "neq": np.not_equal,
    "lg": lambda a, b: (a < b) | (a > b),
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
}
for _kind in ("i32", "u32", "i64", "u64", "i16", "u16", "f32", "f64", "f16"):
    _type = {"i": "iIt", "u": "uUs", "f": "fdh"}[_kind[0]][("32", "64", "16").index(_kind[1:])]
    for _name, _operate in _COMPARE.items():
        if _kind[0] == "f" and _name != "ne" or _name in ("lt", "eq", "le", "gt", "ge", "ne"):
            SIMPLE[f"v_cmp_{_name}_{_kind}"] = (_type * 2, _operate)


def _modified(i: Instruction, function: Callable) -> Callable:
    """`function` with the output modifier and the clamp of the instruction."""
    omod, clamp = i.get("omod"), i.get("clmp")
    real = SIMPLE[i.name][0][0] == "f"
    if clamp and i.name in ("v_add_u32", "v_sub_u32"):  # to the range of uint32
        exact = np.add if i.name == "v_add_u32" else np.subtract
        return lambda a, b: np.clip(exact(_i64(a), _i64(b)), 0, 2**32 - 1).astype(U32)
    if (omod or clamp) and (not real or i.name.startswith("v_cvt")):
        raise NotImplementedError(f"output modifiers of {i.name}")
    factor = (F32(1), F32(2), F32(4), F32(0.5))[omod]
    scaled = (lambda *values: function(*values) * factor) if omod else function
    return (lambda *values: np.fmax(np.fmin(scaled(*values), F32(1)), F32(0))) if clamp else scaled


def _inputs(i: Instruction, types: str) -> list[Read]:
    """Readers of the operands that a row of SIMPLE or WITH_MASK names."""
    types, _, old = types.partition(":")
    if i.name in ("v_fmamk_f32", "v_fmaak_f32"):  # a·K + b, a·b + K
        reads = sources(i, "ff")
        reads.insert(1 if i.name == "v_fmamk_f32" else 2, vector(255, i.literal, "f"))
    else:
        reads = sources(i, types.removesuffix("m"))
    if old:
        reads.append(raw_vector(i.get("vdst") - 256, old))
    if types.endswith("m"):
        pair = i.get("src2") if i.form.startswith("VOP3") and len(types) == 3 else VCC
        reads.append(lambda w: w.mask(pair))
    return reads


def _simple(i: Instruction, kernel: Kernel) -> Run:
    reads, write = _inputs(i, SIMPLE[i.name][0]), destination(i)
    function = _modified(i, SIMPLE[i.name][1])
    if len(reads) == 2:
        a, b = reads
        return lambda w: write(w, function(a(w), b(w)))
    return lambda w: write(w, function(*[read(w) for read in reads]))


def _compare(i: Instruction, kernel: Kernel) -> Run:
    types, function = SIMPLE[i.name]
    a, b = sources(i, types)
    target = i.get("vdst") if i.form.startswith("VOP3") else i.get("sdst") if i.get("sd") else VCC
    return lambda w: w.set_mask(
        target, np.broadcast_to(function(a(w), b(w)), w.exec.shape) & w.exec
    )


def _with_mask(i: Instruction, kernel: Kernel) -> Run:
    types, function = WITH_MASK[i.name]
    reads, write = _inputs(i, types), destination(i)
    target = i.get("sdst") if i.form == "VOP3SD" else VCC

    def run(w: Waves) -> None:
        value, mask = function(*[np.asarray(read(w)) for read in reads])
        write(w, value)
        w.set_mask(target, np.broadcast_to(mask, w.exec.shape) & w.exec)

    return run


def _halves(i: Instruction, types: str, wide: bool) -> list[list[Read]]:
    """Readers of both halves of packed operands, as op_sel and op_sel_hi pick them: registers of a
    pair (`wide`), or halves of one."""
    both = []
    high = i.get("opsel_hi") | i.get("opsel_hi2") << 2
    for picked, negate in ((i.get("opsel"), i.get("neg")), (high, i.get("neg_hi"))):
        reads = []
        for n, kind in enumerate(types):
            code, second = i.get(f"src{n}"), picked >> n & 1
            if wide:
                register = code >= 256 or code < 128
                read = vector(code + (second if register else 0), i.literal, kind)
            else:
                read = vector(code, i.literal, kind, high=bool(second))
            reads.append(with_sign(read, kind, bool(negate >> n & 1), False))
        both.append(reads)
    return both


def _packed(i: Instruction, kernel: Kernel) -> Run:
    types, function = PACKED[i.name]
    wide, row = types[0] == "f", i.get("vdst") - 256
    low, high = _halves(i, types, wide)

    def run(w: Waves) -> None:
        halves = [np.asarray(function(*[read(w) for read in reads])) for reads in (low, high)]
        if wide:
            w.set_vectors(row, *halves)
        else:
            first, second = (half.view(U16).astype(U32) for half in halves)
            w.set_vector(row, np.asarray(first | second << 16))

    return run


def _packed_move(i: Instruction, kernel: Kernel) -> Run:
    """v_pk_mov_b32: one register of each pair."""
    row, (a, b) = i.get("vdst") - 256, _halves(i, "uu", wide=True)[0]
    return lambda w: w.set_vectors(row, np.array(a(w)), np.array(b(w)))


def _bit_operation(i: Instruction, kernel: Kernel) -> Run:
    """v_bitop3: any function of three bits; its truth table is in the modifier bits."""
    table = i.get("omod") << 6 | i.get("abs") << 3 | i.get("neg")
    a, b, c = (vector(i.get(f"src{n}"), i.literal, "u") for n in range(3))
    row, keep = i.get("vdst") - 256, 0xFFFF if i.name.endswith("b16") else 0xFFFFFFFF
    terms = [n for n in range(8) if table >> n & 1]

    def run(w: Waves) -> None:
        x, y, z = a(w), b(w), c(w)
        value = U32(0)
        for n in terms:
            value = value | (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
        w.set_vector(row, np.asarray(value & keep))

    return run


VECTOR: Kinds = [
    (r"v_pk_mov_b32", _packed_move),
    (r"v_bitop3_b(16|32)", _bit_operation),
    (r"v_cmp_\w+", _compare),
    ("|".join(WITH_MASK), _with_mask),
    ("|".join(PACKED), _packed),
    ("|".join(SIMPLE), _simple),
]
