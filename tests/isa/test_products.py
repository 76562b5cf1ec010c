"""Kernels that Triton compiles for gfx950: their results are independent evidence for the layouts
of operands, transposed reads, loads into LDS and lane exchanges."""

from __future__ import annotations

import pytest
import sample_kernels as kernels
import torch

from gfx950.floats import E2M1
from gfx950.hazards import check_waits
from gfx950.machine import Options
from gfx950.races import GlobalRaces, LocalRaces
from gfx950.triton_driver import executing
from gfx950.wait_states import check_wait_states

WATCHED = Options(watches=(LocalRaces, GlobalRaces))
ALONE = Options(seed=3, together=False, late=True)


def instructions(launches) -> set[str]:
    """Mnemonics of the last launch."""
    return {i.name for i in launches[-1].program.instructions.values()}


def sound(launches) -> None:
    """No launch has a hazard."""
    for each in launches:
        ran = each.program
        found = each.told.findings + check_waits(ran) + check_wait_states(ran)
        assert not found, "\n".join(map(str, found))


PRODUCTS = {
    # dtype, tile, warps, b transposed (element (k, n) at k · N + n), further options, instruction
    "bf16": (torch.bfloat16, (64, 64, 64), 4, False, {}, "v_mfma_f32_32x32x16_bf16"),
    "bf16-16x16": (
        torch.bfloat16, (128, 128, 64), 4, False, {"matrix_instr_nonkdim": 16},
        "v_mfma_f32_16x16x32_bf16",
    ),
    "bf16-transposed": (torch.bfloat16, (128, 128, 64), 4, True, {}, "ds_read_b64_tr_b16"),
    "bf16-pipelined": (
        torch.bfloat16, (128, 128, 64), 4, True, {"num_stages": 3}, "buffer_load_dwordx4",
    ),
    "f16": (torch.float16, (64, 64, 64), 4, False, {}, "v_mfma_f32_32x32x16_f16"),
    "f32": (torch.float32, (64, 64, 32), 4, False, {}, "v_mfma_f32_32x32x2_f32"),
    "fp8": (torch.float8_e4m3fn, (128, 128, 128), 4, False, {}, "v_mfma_f32_32x32x64_f8f6f4"),
    "fp8-transposed": (
        torch.float8_e4m3fn, (128, 128, 128), 4, True, {}, "ds_read_b64_tr_b8",
    ),
    "fp8-transposed-16x16": (
        torch.float8_e4m3fn, (128, 128, 128), 4, True, {"matrix_instr_nonkdim": 16},
        "ds_read_b64_tr_b8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", [WATCHED, ALONE], ids=["watched", "alone-late"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, options: Options):
    dtype, (bm, bn, bk), warps, transposed, more, mnemonic = PRODUCTS[name]
    K = 2 * bk if "pipelined" not in name else 4 * bk
    a, b = torch.randn(bm, K).to(dtype), torch.randn(bn, K).to(dtype)
    want = a.double() @ b.double().T
    stored, strides = (b.float().T.contiguous().to(dtype), (bn, 1)) if transposed else (b, (1, K))
    c = torch.full((bm, bn), float("nan"))
    with executing(options=options) as launches:
        kernels.product[(1, 1)](
            a, stored, c, bm, bn, K, 1, *strides, BM=bm, BN=bn, BK=bk, num_warps=warps, **more
        )
    assert mnemonic in instructions(launches)
    # float32 sums of K exact products
    bound = K * 2.0**-24 * (a.double().abs() @ b.double().abs().T)
    assert ((c - want).abs() <= bound).all()
    sound(launches)


def fp4(rows: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed codes, values)"""
    codes = torch.randint(0, 16, (rows, depth), dtype=torch.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, torch.from_numpy(E2M1.values)[codes.long()]


def fp8(rows: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, depth).to(torch.float8_e4m3fn)
    return x, x.float()


@pytest.mark.parametrize("nonkdim", [32, 16])
@pytest.mark.parametrize("kinds", ["fp8-fp8", "fp4-fp8", "fp8-fp4", "fp4-fp4"])
def test_scaled_products(kinds: str, nonkdim: int):
    """A wrong order of K shows where the operands' formats differ; a wrong place of a scale, since
    no two are alike."""
    M, N, K = 64, 64, 512
    make = {"fp8": (fp8, "e4m3"), "fp4": (fp4, "e2m1")}
    (a, a_values), (b, b_values) = (make[k][0](64, K) for k in kinds.split("-"))
    a_scale, b_scale = (torch.randint(118, 136, (64, K // 32), dtype=torch.uint8) for _ in range(2))
    c = torch.full((M, N), float("nan"))
    with executing(options=WATCHED) as launches:
        kernels.scaled_product[(1, 1)](
            a, a_scale, b, b_scale, c, N, K, *(make[k][1] for k in kinds.split("-")),
            BM=M, BN=N, BK=256, num_warps=4, matrix_instr_nonkdim=nonkdim,
        )  # fmt: skip
    shape = "32x32x64" if nonkdim == 32 else "16x16x128"
    assert f"v_mfma_scale_f32_{shape}_f8f6f4" in instructions(launches)
    sides = [
        values.double() * torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
        for values, scale in ((a_values, a_scale), (b_values, b_scale))
    ]
    bound = K * 2.0**-24 * (sides[0].abs() @ sides[1].abs().T)
    assert ((c - sides[0] @ sides[1].T).abs() <= bound).all()
    sound(launches)


@pytest.mark.parametrize("options", [WATCHED, ALONE], ids=["watched", "alone-late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_atomics_and_a_lock(dtype: torch.dtype, options: Options):
    """Waves that spin on a lock let its holder go on, in lockstep too."""
    n, places = 700, 16
    x = torch.randint(-8, 8, (n,)).to(dtype)
    index = torch.randint(0, places, (n,), dtype=torch.int32)
    counts, top = (
        torch.zeros(places, dtype=torch.int32),
        torch.full((places,), -1, dtype=torch.int32),
    )
    sums, lock = torch.zeros(places, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    with executing(options=options) as launches:
        kernels.count[(3,)](x, index, counts, sums, top, lock, n, B=256)
    want = torch.bincount(index, minlength=places)
    want[0] += 3
    assert torch.equal(counts.long(), want) and lock.item() == 0
    assert torch.equal(sums, torch.zeros(places, dtype=dtype).index_add_(0, index.long(), x))
    last = torch.stack([(index == place).nonzero().max() for place in range(places)])
    assert torch.equal(top.long(), last)
    assert launches[0].told.instructions < 200_000


def test_sort_and_scan():
    x, largest = torch.randn(4, 512), torch.zeros(4, 8)
    unsorted = x.clone()
    y, histogram = torch.zeros(1024, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    numbers = torch.randint(0, 5000, (1024,), dtype=torch.int32)
    with executing(options=WATCHED) as launches:
        kernels.sort[(4,)](x, largest, C=512, K=8)
        kernels.scan[(1,)](numbers, y, histogram, 1007, 80, B=1024)
    assert torch.equal(x, unsorted.sort(1)[0]) and torch.equal(largest, unsorted.topk(8, 1)[0])
    assert torch.equal(y, numbers.cumsum(0).int())
    assert torch.equal(histogram, torch.bincount(numbers // 80, minlength=64).int() + 1007 % 80)
    sound(launches)


def test_functions():
    """AMD's units promise 1 ulp; sums of six and the library's polynomials some more."""
    x, y = torch.rand(256) * 5 + 0.1, torch.zeros(256)
    with executing() as launches:
        kernels.functions[(1,)](x, y, B=256)
    v = x.double()
    want = v.sin() + v.exp() + v.log() + v.rsqrt() + v / 3.7 + v.erf()
    assert torch.allclose(y.double(), want, rtol=1e-6, atol=1e-6)
    sound(launches)


def test_a_grid_of_three_dimensions_and_no_preloading():
    for preloaded in (None, False):
        y = torch.zeros(2 * 3 * 4, dtype=torch.int32)
        with executing(options=Options(preloaded=preloaded)):
            kernels.grid[(2, 3, 4)](y)
        assert torch.equal(y, torch.arange(24, dtype=torch.int32))
