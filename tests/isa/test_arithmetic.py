"""Every instruction of the tables of scalar and vector arithmetic, against AMD's published
pseudo-code: random and special values, lane by lane."""

from __future__ import annotations

import re

import assembled
import numpy as np
import pytest
from published import Lane, Unreadable
from tinygrad.runtime.autogen.amd.cdna.str_pcode import PCODE

from gfx950 import scalar, vector
from gfx950.waves import LANES, U32

TEXT: dict[str, str] = {}
for _op, _text in PCODE.items():
    TEXT.setdefault(re.sub(r"_e(32|64)$", "", _op.name.lower()), _text)
SPECIAL = np.array(
    [
        *(0, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80000001),
        *(0x7F7FFFFF, 0x00800000, 0x4F000000, 0x4F800000, 0xFFFFFFFF, 0x7FFFFFFF, 31, 32, 33, 63),
        *(64, 0x3F000000, 0x40200000, 0xCF000000, 0x33800000),
    ],
    U32,
)
UNITS = re.compile(r"v_(exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)_f32")
"""Computed by tables in the hardware: within one unit in the last place, subnormals as zeros."""
EXTREMES = re.compile(r"v_(max|min)3?_f32")
"""Of zeros of both signs either may be taken."""
UNREAD = {
    # concatenations, bit loops and functions that the evaluator does not read: tested below
    *("s_brev_b32", "s_ff1_i32_b32", "s_ff1_i32_b64", "s_bcnt1_i32_b32", "s_bcnt1_i32_b64"),
    *("v_bfrev_b32", "v_ffbh_u32", "v_perm_b32", "v_sin_f32", "v_cos_f32", "v_bcnt_u32_b32"),
    *("s_pack_ll_b32_b16", "s_pack_lh_b32_b16", "s_pack_hh_b32_b16"),
    *("v_alignbit_b32", "v_mul_lo_u16", "v_lshl_add_u64", "v_mad_u64_u32", "v_mad_i64_i32"),
}


def words(kind: str) -> int:
    return 2 if kind in "UId" else 1


def start(seed: int):
    """Waves whose first lanes often hold special values."""
    w = assembled.waves(seed=seed)
    random = np.random.default_rng(seed)
    special = random.choice(SPECIAL, (32, 1, 40))
    w.vector[:32, :, :40] = np.where(
        random.random((32, 1, 40)) < 0.5, special, w.vector[:32, :, :40]
    )
    w.vector[:32, :, 40:] = random.standard_normal((32, 1, 24)).astype(np.float32).view(U32)
    chosen = random.random(20) < 0.5
    w.scalar[:20, 0] = np.where(chosen, random.choice(SPECIAL, 20), w.scalar[:20, 0])
    return w


def joined(registers: np.ndarray, first: int, count: int) -> int:
    return sum(int(registers[first + n]) << 32 * n for n in range(count))


def close(name: str, got: int, want: int, source: int) -> bool:
    """Equal, but for NaNs and what the patterns above allow."""
    if got == want:
        return True
    if name.endswith("f16"):
        return bool(np.isnan(np.array([got, want], np.uint16).view(np.float16)).all())
    if "f32" not in name:
        return False
    a, b, x = np.array([got, want, source & 0xFFFFFFFF], U32).view(np.float32)
    if np.isnan(a) and np.isnan(b):
        return True
    if name == "v_ldexp_f32" and np.isinf(x):  # the text makes infinity · 2^-100000 NaN
        return a == x
    if EXTREMES.fullmatch(name):
        return a == b == 0
    tiny = (abs(a) < 2e-38 and abs(b) < 2e-38) or 0 < abs(x) < 1.2e-38
    return bool(UNITS.fullmatch(name)) and (abs(got - want) <= 1 or tiny)


def wanted(name: str, names: dict[str, int], lane: int) -> dict[str, int]:
    with np.errstate(all="ignore"):
        return Lane(names, lane).run(TEXT[name])


VECTOR = [
    name
    for name in vector.SIMPLE
    # a·K + b and a·b + K have no operands of their own; floor(x + 0.5) is not exact near 2^23;
    # the text of the end of a division says 2^32 (test_division)
    if name in TEXT and name not in ("v_fmamk_f32", "v_fmaak_f32", "v_rndne_f32", "v_div_fmas_f32")
]
SCALAR = [name for name in scalar.ALU if name in TEXT]


@pytest.mark.parametrize("name", VECTOR)
def test_vector(name: str):
    types = vector.SIMPLE[name][0].partition(":")[0]
    masked, types = types.endswith("m"), types.removesuffix("m")
    at, operands = 4, []
    for kind in types:
        operands.append(f"v{at}" if words(kind) == 1 else f"v[{at}:{at + 1}]")
        at += 2
    compare = name.startswith("v_cmp")
    wide = 2 if re.search(r"D0\.[a-z]*64", TEXT[name]) and not compare else 1
    target = "vcc" if compare else "v[20:21]" if wide == 2 else "v20"
    target += ", s[8:9]" if name.startswith("v_mad_") and wide == 2 else ""
    operands += ["vcc"] if masked else []
    for seed in range(2):
        before, w = start(seed), start(seed)
        assembled.run(f"{name} {target}, {', '.join(operands)}", w)
        for lane in range(0, LANES, 1 if seed else 3):
            column = before.vector[:, 0, lane]
            names = {f"S{n}": joined(column, 4 + 2 * n, words(k)) for n, k in enumerate(types)}
            source, vcc = names["S0"], joined(before.scalar[:, 0], 106, 2)
            old = 0 if compare else joined(column, 20, 2)
            try:
                want = wanted(name, names | {"D0": old, "SCC": 0, "VCC": vcc}, lane)["D0"]
            except (Unreadable, TypeError, ValueError, KeyError):
                assert name in UNREAD, f"{name}: its pseudo-code cannot be read"
                pytest.skip("its pseudo-code cannot be read")
            if compare:
                assert w.mask(106)[0, lane] == want >> lane & 1, (lane, names)
                continue
            bits = 16 if re.search(r"D0\.[a-z]16", TEXT[name]) else 32 * wide
            got = joined(w.vector[:, 0, lane], 20, wide) & (1 << bits) - 1
            assert close(name, got, want & (1 << bits) - 1, source), (lane, names, got, want)


@pytest.mark.parametrize("name", SCALAR)
def test_scalar(name: str):
    types, function, scc = scalar.ALU[name]
    types = types.partition(":")[0].replace("c", "")
    narrow = name.startswith(("s_bcnt1", "s_ff1"))
    wide = 2 if re.search(r"D0\.[a-z]*64", TEXT[name]) and not narrow else 1
    target = [] if function is None else ["s[20:21]" if wide == 2 else "s20"]
    for seed in range(40):
        before, w = start(seed), start(seed)
        column, constant = before.scalar[:, 0], int(before.scalar[30, 0]) & 0xFFFF
        operands = [
            str(constant) if kind in "kK"
            else f"s{4 + 2 * n}" if words(kind) == 1 else f"s[{4 + 2 * n}:{5 + 2 * n}]"
            for n, kind in enumerate(types)
        ]  # fmt: skip
        assembled.run(f"{name} {', '.join(target + operands)}", w)
        names = {
            f"S{n}": constant if kind in "kK" else joined(column, 4 + 2 * n, words(kind))
            for n, kind in enumerate(types)
        }
        old = {"D0": joined(column, 20, 2), "SCC": int(before.scc[0]), "VCC": 0}
        try:
            want = wanted(name, names | old, 0)
        except (Unreadable, TypeError, ValueError, KeyError):
            assert name in UNREAD, f"{name}: its pseudo-code cannot be read"
            pytest.skip("its pseudo-code cannot be read")
        got = joined(w.scalar[:, 0], 20, wide)
        assert got == want["D0"] & (1 << 32 * wide) - 1, names
        assert scc is None or int(w.scc[0]) == want["SCC"] & 1, names


def one(text: str, *values: int, wide: bool = False) -> int:
    """v20 (or v[20:21]) of lane 3 after `text` on v4, v5, … there."""
    w = assembled.waves()
    for n, value in enumerate(values):
        w.vector[4 + n, 0, 3] = value
    assembled.run(text, w)
    return joined(w.vector[:, 0, 3], 20, 2 if wide else 1)


def test_what_the_pseudo_code_leaves_out():
    """Against Python's integers."""
    for x in map(int, SPECIAL):
        bits = f"{x:032b}"
        assert one("v_bfrev_b32 v20, v4", x) == int(bits[::-1], 2)
        assert one("v_ffbh_u32 v20, v4", x) == (bits.index("1") if x else 0xFFFFFFFF)
        assert one("v_bcnt_u32_b32 v20, v4, v5", x, 7) == x.bit_count() + 7
        for y in map(int, SPECIAL[::3]):
            assert (
                one("v_alignbit_b32 v20, v4, v5, v6", x, y, 13) == (x << 32 | y) >> 13 & 0xFFFFFFFF
            )
            total = (y << 32 | x) + ((x << 32 | y) << 5) & (1 << 64) - 1
            signed = [n - (n >> 31 << 32) for n in (x, y)]
            for text, want in (
                ("v_lshl_add_u64 v[20:21], v[4:5], 5, v[8:9]", total),
                ("v_mad_u64_u32 v[20:21], vcc, v4, v5, v[8:9]", y * x + (y << 32 | x)),
                ("v_mad_i64_i32 v[20:21], vcc, v4, v5, v[8:9]",
                 signed[0] * signed[1] + (y << 32 | x)),
            ):  # fmt: skip
                w = assembled.waves()
                w.vector[4:6, 0, 3], w.vector[8:10, 0, 3] = (y, x), (x, y)
                assembled.run(text, w)
                assert joined(w.vector[:, 0, 3], 20, 2) == want % (1 << 64)
    w = start(0)
    w.set_mask(8, (np.arange(LANES) % 3 == 0)[None])
    x, y = w.vector[4, 0], w.vector[5, 0]
    got = assembled.run("v_cndmask_b32 v20, -v4, |v5|, s[8:9]", w).vector[20, 0]
    assert (got == np.where(np.arange(LANES) % 3, x ^ 0x80000000, y & 0x7FFFFFFF)).all()
    x = x.view(np.float32)
    got = assembled.run("v_rndne_f32 v20, v4", w).vector[20, 0].view(np.float32)
    for value, rounded in zip(x.tolist(), got.tolist()):
        finite = np.isfinite(value)
        assert rounded == (round(value) if finite else value) or np.isnan(value), value
    source = (0x0123456789ABCDEF).to_bytes(8, "little")
    select = [0, 7, 12, 13]  # bytes of v4:v5, then 0 and 255
    got = one(
        "v_perm_b32 v20, v4, v5, v6", 0x01234567, 0x89ABCDEF, int.from_bytes(select, "little")
    )
    assert list(got.to_bytes(4, "little")) == [source[0], source[7], 0, 255]
    for text, want in (
        ("s_brev_b32 s20, s4", 0x000C0000),
        ("s_ff1_i32_b32 s20, s4", 12),
        ("s_ff1_i32_b64 s20, s[4:5]", 12),
        ("s_bcnt1_i32_b32 s20, s4", 2),
        ("s_bcnt1_i32_b64 s20, s[4:5]", 2 + 1),
        ("s_mov_b32 s20, 1\ns_bitset1_b32 s20, s5", 17),
        ("s_mov_b32 s20, 17\ns_bitset0_b32 s20, s5", 1),
        ("s_pack_ll_b32_b16 s20, s4, s5", 0x00043000),
        ("s_pack_lh_b32_b16 s20, s4, s5", 0x00003000),
        ("s_pack_hh_b32_b16 s20, s4, s4", 0x00000000),
    ):
        w = assembled.waves()
        w.scalar[4], w.scalar[5] = 0x3000, 4
        assert int(assembled.run(text, w).scalar[20, 0]) == want


def test_carries():
    """64-bit sums and differences in two steps, through VCC and through a pair."""
    random = np.random.default_rng(5)
    x, y = (random.integers(0, 2**64, LANES, np.uint64) for _ in range(2))
    x[:3], y[:3] = (0, 2**64 - 1, 2**32 - 1), (0, 1, 1)
    for first, second, want in (
        ("v_add_co_u32", "v_addc_co_u32", x + y),
        ("v_sub_co_u32", "v_subb_co_u32", x - y),
        ("v_subrev_co_u32", "v_subbrev_co_u32", y - x),
    ):
        for pair in ("vcc", "s[8:9]"):
            w = assembled.waves()
            for n, value in enumerate((x, y)):
                w.vector[4 + 2 * n, 0], w.vector[5 + 2 * n, 0] = value & 0xFFFFFFFF, value >> 32
            assembled.run(f"{first} v20, {pair}, v4, v6\n{second} v21, {pair}, v5, v7, {pair}", w)
            got = w.vector[20, 0].astype(np.uint64) | w.vector[21, 0].astype(np.uint64) << 32
            assert (got == want).all(), (first, pair)


def test_division():
    """The sequence that LLVM emits for a correctly rounded quotient."""
    random = np.random.default_rng(6)
    n = (random.standard_normal(LANES) * np.exp2(random.uniform(-120, 120, LANES))).astype(
        np.float32
    )
    d = (random.standard_normal(LANES) * np.exp2(random.uniform(-120, 120, LANES))).astype(
        np.float32
    )
    n[:4], d[:4] = (0, 1, 3e38, 1e-40), (1, 0, 1e-3, 2)
    w = assembled.waves()
    w.vector[4, 0], w.vector[5, 0] = n.view(U32), d.view(U32)
    assembled.run(
        "\n".join(
            (
                "v_div_scale_f32 v6, s[8:9], v5, v5, v4",
                "v_rcp_f32 v7, v6",
                "v_fma_f32 v8, -v6, v7, 1.0",
                "v_fma_f32 v7, v8, v7, v7",
                "v_div_scale_f32 v8, vcc, v4, v5, v4",
                "v_mul_f32 v9, v8, v7",
                "v_fma_f32 v10, -v6, v9, v8",
                "v_fma_f32 v9, v10, v7, v9",
                "v_fma_f32 v6, -v6, v9, v8",
                "v_div_fmas_f32 v6, v6, v7, v9",
                "v_div_fixup_f32 v20, v6, v5, v4",
            )
        ),
        w,
    )
    with np.errstate(all="ignore"):
        assert (w.vector[20, 0].view(np.float32) == n / d).all()
