"""The compile gate of TileLang's kernels: code of gfx950 and gfx942, made with no GPU."""

from __future__ import annotations

import pytest
import table
import tilelang_gate as gate
from chips import CHIPS, matrix_instruction
from tilelang_launches import missing

from dsv4_plugin.ops.compile_failure import compile_failure

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

EVERY = [
    pytest.param(operator, case, arch, id=f"{operator}/{case.name}/{arch}")
    for operator, cases in gate.CASES.items()
    for case in cases
    for arch in case.archs
]
IN_FLIGHT = 25_000
"""Bytes that a compute unit of gfx950 needs under way: 8 TB/s times 0.8 us over 256 units."""


def rows(operator: str, case, arch: str) -> dict[str, dict]:
    start = f"{operator} | {case.name} | {arch} | "
    return {name[len(start) :]: row for name, row in gate.rows().items() if name.startswith(start)}


@pytest.mark.parametrize(("operator", "case", "arch"), EVERY)
def test_fits_the_chip_and_multiplies_as_meant(operator, case, arch):
    """No spills, no scratch, the workgroups a unit and the matrix instructions that the case
    names."""
    found = rows(operator, case, arch)
    assert found, "the wrapper launched nothing"
    for kernel, row in found.items():
        assert (row["spills"], row["scratch"]) == (0, 0), kernel
        assert row["lds"] <= CHIPS[arch].local_memory, kernel
        assert row["wg_per_cu"] >= case.workgroups.get(kernel, 1), (kernel, row["vgpr"])
        rates = {matrix_instruction(name).rate for name in row["mfma"]}
        assert rates == ({case.matrix[kernel]} if kernel in case.matrix else set()), kernel


def test_indexer_keys_are_on_their_way_together():
    """A loop that waits after each load has one wait of 0 a load; here the first wait leaves the
    second page's loads under way, and the last is the only one of 0."""
    (row,) = rows("indexer_logits", gate.CASES["indexer_logits"][0], "gfx950").values()
    assert row["loop_waits"][-1] == 0 and min(row["loop_waits"][:-1]) >= 3
    assert row["bytes_in_flight_per_cu"] >= IN_FLIGHT
    assert row["lds"] == 0


def test_mhc_waits_for_each_load():
    """T.Pipelined overlaps nothing on HIP: every wait of the product's loop is for all loads. One
    that is not says that TileLang has learned it, and the kernel can be written anew."""
    found = rows("mhc_pre", gate.CASES["mhc_pre"][0], "gfx950")
    assert set(found["mhc_project_kernel"]["loop_waits"]) == {0}


def test_hopper_form_uses_its_wide_products():
    from dsv4_plugin.kernels.tilelang.indexer_logits import TILED

    assert "wgmma" in TILED.lower("sm_90", heads=64, fnuz=False).source


def test_table_is_as_kept():
    kept, now = gate.kept(), gate.versions()
    for name in ("tilelang", "clang"):
        if kept["versions"].get(name) != now[name]:
            pytest.skip(f"the table is of {name} {kept['versions'].get(name)}, this is {now[name]}")
    lines = table.moved(kept, gate.rows())
    assert not lines, "\n".join(
        ["the compile table moved; if that is meant: python tests/compile/tilelang_gate.py", *lines]
    )


def test_a_kernel_that_cannot_be_lowered_is_a_compile_failure():
    """What selection takes as a reason to go on without it, or to stop where it was named."""
    import tilelang.language as T

    from dsv4_plugin.kernels.tilelang.build import Kernel

    def unsupported():
        @T.prim_func
        def product(a: T.Tensor((64, 64), "float32"), b: T.Tensor((64, 64), "float32")):
            with T.Kernel(1, threads=256) as _:
                left = T.alloc_shared((64, 64), "float32")
                total = T.alloc_fragment((64, 64), "float32")
                T.copy(a, left)
                T.gemm(left, left, total, transpose_B=True, clear_accum=True)  # no fp32 on CDNA
                T.copy(total, b)

        return product

    with pytest.raises(Exception) as error:
        Kernel(unsupported).lower("gfx950")
    assert compile_failure(error.value)
