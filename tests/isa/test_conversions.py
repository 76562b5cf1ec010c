"""Conversions through the instructions: every 8- and 16-bit number, against ml_dtypes and numpy."""

from __future__ import annotations

import assembled
import ml_dtypes
import numpy as np
import pytest
from assembled import spread

F8 = {"fp8": ml_dtypes.float8_e4m3fn, "bf8": ml_dtypes.float8_e5m2}
SMALL = F8 | {"fp4": ml_dtypes.float4_e2m1fn}
WIDE = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
HALVES = np.arange(1 << 16, dtype=np.uint32)
SCALES = (1.0, 2.0**-7, 2.0**9, 1.75 * 2.0**3)  # the mantissa of a scale does not count


@pytest.fixture(autouse=True)
def _special_values():
    with np.errstate(all="ignore"):
        yield


def floats(raw: np.ndarray, dtype: type) -> np.ndarray:
    return raw.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}").astype(np.uint32)


def same(got: np.ndarray, want: np.ndarray, dtype: type) -> None:
    """Equal bits, but any NaN for a NaN."""
    got, want = got.ravel()[: want.size], bits(want.ravel())
    differs = got != want
    if differs.any():
        nan = np.isnan(floats(got[differs], dtype).astype(np.float32))
        wanted = np.isnan(floats(want[differs], dtype).astype(np.float32))
        at = np.flatnonzero(differs)[~(nan & wanted)]
        assert not at.size, [(int(n), hex(got[n]), hex(want[n])) for n in at[:5]]


def power(scale: float) -> float:
    return 2.0 ** np.floor(np.log2(scale))


def converted(text: str, v1: np.ndarray, v2: np.ndarray | None = None, scale: float = 1.0, mode=0):
    """v4, v5 after an instruction on v1, v2 and the scale in s8."""
    w = assembled.waves(len(v1))
    w.vector[1], w.scalar[8] = v1, np.float32(scale).view(np.uint32)
    if v2 is not None:
        w.vector[2] = v2
    w.mode[:] |= np.uint32(mode)
    before = w.vector[4].copy()
    assembled.run(text, w)
    return w.vector[4], w.vector[5], before


@pytest.mark.parametrize("small", F8)
@pytest.mark.parametrize("select", range(4))
def test_8_bits_to_f32(small: str, select: int):
    codes = np.arange(256, dtype=np.uint32)
    got, _, _ = converted(
        f"v_cvt_f32_{small}_sdwa v4, v1 src0_sel:BYTE_{select}", spread(codes << 8 * select)
    )
    same(got, floats(codes, F8[small]).astype(np.float32), np.float32)


@pytest.mark.parametrize("small", F8)
@pytest.mark.parametrize("select", range(2))
def test_pairs_of_8_bits_to_f32(small: str, select: int):
    low, high, _ = converted(
        f"v_cvt_pk_f32_{small}_sdwa v[4:5], v1 src0_sel:WORD_{select}",
        spread(HALVES << 16 * select),
    )
    same(low, floats(HALVES & 255, F8[small]).astype(np.float32), np.float32)
    same(high, floats(HALVES >> 8, F8[small]).astype(np.float32), np.float32)


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("scale", SCALES)
def test_scaled_up(wide: str, small: str, scale: float):
    """value · 2^exponent(scale), of all pairs of codes, from every place in the register."""
    form, width = SMALL[small], 4 if small == "fp4" else 8
    codes = np.arange(1 << 2 * width, dtype=np.uint32)
    target = "v[4:5]" if wide == "f32" else "v4"
    places = (
        [("op_sel:[1,0,0]", 16)] if width == 8 else [("op_sel:[1,0,0]", 8), ("op_sel:[0,1,0]", 16)]
    )
    for modifier, shift in [("", 0), *places]:
        text = f"v_cvt_scalef32_pk_{wide}_{small} {target}, v1, s8 {modifier}"
        first, second, _ = converted(text, spread(codes << shift), scale=scale)
        if wide != "f32":
            first, second = first & 0xFFFF, first >> 16
        for got, code in ((first, codes & (1 << width) - 1), (second, codes >> width)):
            want = floats(code, form).astype(np.float64) * power(scale)
            same(got, want.astype(np.float32).astype(WIDE[wide]), WIDE[wide])


def narrowed(x: np.ndarray, small: str, saturate: bool) -> np.ndarray:
    """The nearest number of a small format; what is too large is infinity or NaN as ml_dtypes has
    it, or the largest."""
    form = SMALL[small]
    largest = float(ml_dtypes.finfo(form).max)
    if saturate or small == "fp4":
        x = np.where(np.isnan(x), x, np.clip(x, -largest, largest))
    return x.astype(form)


@pytest.mark.parametrize("saturate", [False, True], ids=["overflows", "saturates"])
@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("wide", ["bf16", "f16"])
def test_16_bits_scaled_down(wide: str, small: str, saturate: bool):
    """value / 2^exponent(scale) of every 16-bit number; MODE.FP16_OVFL makes it saturate."""
    x = floats(HALVES, WIDE[wide]).astype(np.float64)
    for scale in SCALES:
        text = f"v_cvt_scalef32_pk_{small}_{wide} v4, v1, s8"
        got, _, before = converted(
            text, spread(HALVES | HALVES[::-1] << 16), scale=scale, mode=saturate << 23
        )
        width = 4 if small == "fp4" else 8
        keep = ~np.isnan(x) | (small != "fp4")  # FP4 has no NaN
        want = narrowed(x / power(scale), small, saturate)
        low, high = got & (1 << width) - 1, got >> width & (1 << width) - 1
        same(low.ravel()[keep], want[keep], SMALL[small])
        same(high.ravel()[::-1][keep], want[keep], SMALL[small])
        assert (got >> 2 * width == before >> 2 * width).all()


@pytest.mark.parametrize("saturate", [False, True], ids=["overflows", "saturates"])
@pytest.mark.parametrize("small", F8)
def test_f32_to_8_bits(small: str, saturate: bool):
    """Every bf16 number and a million random ones, with and without a scale of 1."""
    random = np.random.default_rng(0).integers(0, 2**32, 1 << 18, np.uint32)
    raw = np.concatenate([HALVES << 16, HALVES << 16 | 0x8000, random])
    want = narrowed(raw.view(np.float32).astype(np.float64), small, saturate)
    for text in (
        f"v_cvt_pk_{small}_f32 v4, v1, v1 op_sel:[0,0,1]",
        f"v_cvt_scalef32_pk_{small}_f32 v4, v1, v1, s8 op_sel:[0,0,0,1]",
    ):
        got, _, before = converted(text, spread(raw), mode=saturate << 23)
        same(got >> 16 & 255, want, F8[small])
        same(got >> 24, want, F8[small])
        assert ((got & 0xFFFF) == (before & 0xFFFF)).all()


def test_f16():
    got, _, _ = converted("v_cvt_f32_f16 v4, v1", spread(HALVES))
    same(got, floats(HALVES, np.float16).astype(np.float32), np.float32)
    # every f16 number, its neighbours in f32, and what lies in the middle of two
    near = bits(floats(HALVES, np.float16).astype(np.float32))
    for raw in (near, near + 1, near - 1, near + 0x1000):
        want = raw.view(np.float32).astype(np.float16)
        got, _, _ = converted("v_cvt_f16_f32 v4, v1", spread(raw))
        same(got & 0xFFFF, want, np.float16)
        got, _, _ = converted("v_cvt_pk_f16_f32 v4, v1, v1", spread(raw))
        same(got >> 16, want, np.float16)


def test_bf16():
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        raw = HALVES << 16 | low
        want = raw.view(np.float32).astype(ml_dtypes.bfloat16)
        got, _, _ = converted("v_cvt_pk_bf16_f32 v4, v1, v1", spread(raw))
        same(got & 0xFFFF, want, ml_dtypes.bfloat16)
        same(got >> 16, want, ml_dtypes.bfloat16)


def test_integers():
    """Towards zero, into range, NaN to 0."""
    raw = np.concatenate([HALVES << 16, HALVES << 16 | 0xFFFF])
    x = raw.view(np.float32).tolist()
    for text, low, high in (
        ("v_cvt_u32_f32 v4, v1", 0, 2**32 - 1),
        ("v_cvt_i32_f32 v4, v1", -(2**31), 2**31 - 1),
    ):
        want = [0 if n != n else max(low, min(high, int(max(min(n, 1e20), -1e20)))) for n in x]
        got, _, _ = converted(text, spread(raw))
        assert (got.ravel()[: len(want)] == np.array(want, np.int64).astype(np.uint32)).all()
    got, _, _ = converted("v_cvt_f32_i32 v4, v1", spread(raw))
    same(got, raw.view(np.int32).astype(np.float32), np.float32)
    got, _, _ = converted("v_cvt_f32_u32 v4, v1", spread(raw))
    same(got, raw.astype(np.float32), np.float32)
    for n in range(4):
        got, _, _ = converted(f"v_cvt_f32_ubyte{n} v4, v1", spread(raw))
        same(got, (raw >> 8 * n & 255).astype(np.float32), np.float32)


@pytest.mark.parametrize("kind", ["fp8", "bf8"])
def test_gfx942_has_other_8_bit_formats(kind: str):
    """One zero, no infinity, a bias one larger."""
    form = {"fp8": ml_dtypes.float8_e4m3fnuz, "bf8": ml_dtypes.float8_e5m2fnuz}[kind]
    codes = np.arange(256, dtype=np.uint32)
    w = assembled.waves(4)
    w.vector[1] = spread(codes)
    assembled.run(f"v_cvt_f32_{kind} v4, v1", w, "gfx942")
    same(w.vector[4], floats(codes, form).astype(np.float32), np.float32)
