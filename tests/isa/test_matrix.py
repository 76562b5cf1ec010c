"""Every matrix instruction that our kernels use: operands with one 1 tell which lane and element is
which row and column; random ones are held against float64."""

from __future__ import annotations

import assembled
import ml_dtypes
import numpy as np
import pytest
from assembled import LANES, ROWS

FORMATS = {
    "bf16": (ml_dtypes.bfloat16, 16),
    "f16": (np.float16, 16),
    "f32": (np.float32, 32),
    "fp8": (ml_dtypes.float8_e4m3fn, 8),
    "bf8": (ml_dtypes.float8_e5m2, 8),
    "fp6": (ml_dtypes.float6_e2m3fn, 6),
    "bf6": (ml_dtypes.float6_e3m2fn, 6),
    "fp4": (ml_dtypes.float4_e2m1fn, 4),
}
MIXED = ("fp8", "bf8", "fp6", "bf6", "fp4")
"""By cbsz and blgp."""
PLAIN = [
    ("f32_16x16x32_bf16", "bf16", "bf16"),
    ("f32_32x32x16_bf16", "bf16", "bf16"),
    ("f32_16x16x32_f16", "f16", "f16"),
    ("f32_32x32x16_f16", "f16", "f16"),
    ("f32_16x16x16_bf16", "bf16", "bf16"),
    ("f32_32x32x8_bf16", "bf16", "bf16"),
    ("f32_16x16x16_f16", "f16", "f16"),
    ("f32_32x32x8_f16", "f16", "f16"),
    ("f32_16x16x4_f32", "f32", "f32"),
    ("f32_32x32x2_f32", "f32", "f32"),
    ("f32_16x16x32_fp8_fp8", "fp8", "fp8"),
    ("f32_32x32x16_fp8_fp8", "fp8", "fp8"),
    ("f32_16x16x32_bf8_fp8", "bf8", "fp8"),
]
SHAPES = PLAIN + [
    (f"f32_{shape}_f8f6f4", a, b)
    for shape in ("16x16x128", "32x32x64")
    for a, b in [(a, b) for a in MIXED for b in ("fp8", "fp4")] + [("fp8", "bf6")]
]


def place(rows: int, depth: int, bits: int, mixed: bool, lane: int, n: int) -> tuple[int, int]:
    """(row, k) of element `n` of a lane (AMD's Matrix Instruction Calculator, and for the operands
    of f8f6f4 what Triton's compiled products show: test_products.py)."""
    groups = LANES // rows
    each = depth // groups
    group = lane // rows
    if mixed and bits == 8:  # 16 bytes of the one half of K, 16 of the other
        return lane % rows, n % 16 + 16 * group + (depth // 2 if n >= 16 else 0)
    return lane % rows, group * each + n


def registers(matrix: np.ndarray, kind: str, mixed: bool) -> np.ndarray:
    """uint32 [registers, waves, 64] of an operand [waves, rows, K], one element at a time."""
    count, rows, depth = matrix.shape
    dtype, bits = FORMATS[kind]
    codes = matrix.astype(dtype)
    codes = codes.view(f"u{codes.dtype.itemsize}").astype(np.uint64)
    each = rows * depth // LANES
    words = np.zeros((each * bits // 32 + 1, count, LANES), np.uint64)
    for lane in range(LANES):
        for n in range(each):
            row, k = place(rows, depth, bits, mixed, lane, n)
            word, shift = divmod(n * bits, 32)
            value = codes[:, row, k] << np.uint64(shift)
            words[word, :, lane] |= value & np.uint64(0xFFFFFFFF)
            words[word + 1, :, lane] |= value >> np.uint64(32)
    return words[:-1].astype(np.uint32)


def result(w, rows: int, first: int) -> np.ndarray:
    """float32 [waves, M, N]: a register of a lane is one row of column lane mod N."""
    size = rows * rows // LANES
    found = np.empty((w.count, rows, rows), np.float32)
    for n in range(size):
        for lane in range(LANES):
            row = 4 * (lane // rows) + n % 4 + n // 4 * (4 * LANES // rows)
            found[:, row, lane % rows] = w.vector[first + n, :, lane].view(np.float32)
    return found


def multiply(
    name: str, a_kind: str, b_kind: str, a: np.ndarray, b: np.ndarray, c=None, modifiers=""
):
    """D [waves, M, N] of a [waves, M, K] and b [waves, N, K], through the instruction."""
    rows, mixed = a.shape[1], "f8f6f4" in name
    w = assembled.waves(len(a))
    left, right = registers(a, a_kind, mixed), registers(b, b_kind, mixed)
    w.vector[16 : 16 + len(left)] = left
    w.vector[32 : 32 + len(right)] = right
    if mixed:
        modifiers += f" cbsz:{MIXED.index(a_kind)} blgp:{MIXED.index(b_kind)}"
    size = rows * rows // LANES
    text = f"v_mfma_{name} a[0:{size - 1}], v[16:{15 + len(left)}], v[32:{31 + len(right)}], "
    assembled.run(
        f"{text} {'0' if c is None else c}{modifiers}".replace("v[16:16]", "v16").replace(
            "v[32:32]", "v32"
        ),
        w,
    )
    return result(w, rows, ROWS)


def shape(name: str) -> tuple[int, int]:
    rows, _, depth = name.split("_")[1].split("x")
    return int(rows), int(depth)


@pytest.mark.parametrize(("name", "a", "b"), SHAPES, ids=lambda x: x)
def test_each_element_is_where_it_belongs(name: str, a: str, b: str):
    """A wave for each element of A that is 1 among zeros: D has that row of B, and vice versa."""
    rows, depth = shape(name)
    ones = np.zeros((rows * depth, rows, depth), np.float32)
    ones.reshape(rows * depth, -1)[np.arange(rows * depth), np.arange(rows * depth)] = 1
    picked = np.random.default_rng(0).permutation(rows * depth)[:256]  # of all, in every row and k
    ones = ones[picked]
    row, k = picked // depth, picked % depth
    codes = np.random.default_rng(1).integers(0, 8, (1, rows, depth)) - 4.0  # exact in all formats
    other = np.broadcast_to(np.clip(codes, -4, 4), ones.shape)
    got = multiply(name, a, b, ones, other)
    want = np.zeros_like(got)
    want[np.arange(len(picked)), row] = other[0][:, k].T
    assert (got == want).all()
    got = multiply(name, a, b, other, ones)
    want = np.zeros_like(got)
    want[np.arange(len(picked)), :, row] = other[0][:, k].T
    assert (got == want).all()


@pytest.mark.parametrize(("name", "a", "b"), SHAPES, ids=lambda x: x)
def test_products(name: str, a: str, b: str):
    """Random operands and C = 1; sums of at most 128 exact products in float32."""
    rows, depth = shape(name)
    random = np.random.default_rng(2)
    left, right = (random.standard_normal((3, rows, depth)).astype(FORMATS[k][0]) for k in (a, b))
    left, right = left.astype(np.float32), right.astype(np.float32)
    got = multiply(name, a, b, left, right, "1.0")
    want = left.astype(np.float64) @ right.astype(np.float64).transpose(0, 2, 1) + 1
    # a float32 sum of `depth` terms is off by at most depth · 2^-24 of the sum of their sizes
    size = np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64).transpose(0, 2, 1) + 1
    assert (np.abs(got - want) <= depth * 2.0**-24 * size).all()


@pytest.mark.parametrize("name", ["scale_f32_16x16x128_f8f6f4", "scale_f32_32x32x64_f8f6f4"])
@pytest.mark.parametrize(
    ("a", "b"), [("fp8", "fp8"), ("fp4", "fp8"), ("fp8", "fp4"), ("fp4", "fp4")]
)
def test_scales(name: str, a: str, b: str):
    """Every lane's own scale, from each byte of its register; 255 makes its block NaN."""
    rows, depth = shape(name.removeprefix("scale_"))
    random = np.random.default_rng(3)
    blocks = depth // 32
    left, right = (
        random.standard_normal((1, rows, depth)).astype(FORMATS[k][0]).astype(np.float32)
        for k in (a, b)
    )
    size, mixed = rows * rows // LANES, [registers(x, k, True) for x, k in ((left, a), (right, b))]
    for byte in range(4):
        w = assembled.waves()
        w.vector[16 : 16 + len(mixed[0])], w.vector[32 : 32 + len(mixed[1])] = mixed
        scales = random.integers(120, 135, (2, 4, LANES)).astype(np.uint8)
        scales[0, byte, 5] = 255
        w.vector[50, 0], w.vector[51, 0] = (
            np.ascontiguousarray(s.T).view(np.uint32)[:, 0] for s in scales
        )
        select = f"op_sel:[{byte & 1},{byte & 1},0] op_sel_hi:[{byte >> 1},{byte >> 1},0]"
        a_at, b_at = f"v[16:{15 + len(mixed[0])}]", f"v[32:{31 + len(mixed[1])}]"
        assembled.run(
            f"v_mfma_{name} a[0:{size - 1}], {a_at}, {b_at}, 0, v50, v51 {select}"
            f" cbsz:{MIXED.index(a)} blgp:{MIXED.index(b)}",
            w,
        )
        powers = np.where(scales[:, byte] == 255, np.nan, np.exp2(scales[:, byte] - 127.0))
        sides = []
        for x, power in zip((left, right), powers):
            by_block = np.stack(
                [power[rows * block : rows * (block + 1)] for block in range(blocks)], 1
            )
            sides.append(x[0] * np.repeat(by_block, 32, axis=1))
        want = sides[0] @ sides[1].T
        got = result(w, rows, ROWS)[0]
        assert np.isnan(want[5]).all() and (np.isnan(got) == np.isnan(want)).all()
        known = ~np.isnan(want)
        bound = depth * 2.0**-24 * (np.abs(sides[0]) @ np.abs(sides[1]).T)
        assert (np.abs(got - want)[known] <= bound[known]).all()


def test_accumulation_registers():
    """They are the rows behind the vector registers; inactive lanes keep what they had."""
    w = assembled.waves()
    source = w.vector[3].copy()
    assembled.run(
        "v_accvgpr_write_b32 a7, v3\nv_accvgpr_mov_b32 a9, a7\nv_accvgpr_read_b32 v5, a9", w
    )
    assert (w.vector[ROWS + 7] == source).all() and (w.vector[5] == source).all()
