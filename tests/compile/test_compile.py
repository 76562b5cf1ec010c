"""The compile gate: every kernel and configuration for gfx950, gfx942 and sm_90, on a machine with
no GPU."""

from __future__ import annotations

import pytest
import table
from chips import CHIPS, matrix_instruction
from registry import Case, operators

EVERY = [
    pytest.param(operator, case, arch, id=f"{operator}/{case.name}/{arch}")
    for operator, cases in operators().items()
    for case in cases
    for arch in case.archs
]
MOST_SECONDS = 20
"""Twice the slowest of today's kernels on a core of the test machine."""
pytestmark = pytest.mark.skipif(not EVERY, reason="no kernel lists cases yet")


@pytest.mark.parametrize(("operator", "case", "arch"), EVERY)
def test_fits_the_chip(operator: str, case: Case, arch: str):
    """No spills, no scratch, local memory within the chip, and at least one launch."""
    rows = table.rows(operator, case.name, arch)
    assert rows, "the wrapper launched nothing"
    for kernel, row in rows.items():
        assert (row["spills"], row["scratch"]) == (0, 0), kernel
        assert row["lds"] <= CHIPS[arch].local_memory, kernel
        assert row["wg_per_cu"] >= 1, kernel


@pytest.mark.parametrize(("operator", "case", "arch"), EVERY)
def test_compiles_in_seconds(operator: str, case: Case, arch: str):
    """CPU seconds of this process, which are a server's stall at the first call; ptxas, a process
    of its own, is not in them."""
    for kernel, seconds in table.compile_seconds(operator, case.name, arch).items():
        assert seconds < MOST_SECONDS, kernel


@pytest.mark.parametrize(("operator", "case", "arch"), EVERY)
def test_matrix_instructions(operator: str, case: Case, arch: str):
    """Products run on the matrix units, at the rate the case names: a silent upcast has another
    mnemonic."""
    for kernel, row in table.rows(operator, case.name, arch).items():
        rate = case.matrix.get(kernel.split("#")[0])
        assert bool(row["mfma"]) == (rate is not None), (kernel, row["mfma"])
        if arch == "gfx950":
            assert {matrix_instruction(name).rate for name in row["mfma"]} <= {rate}, (
                kernel,
                row["mfma"],
            )


@pytest.mark.parametrize(("operator", "case", "arch"), EVERY)
def test_no_product_is_repeated(operator: str, case: Case, arch: str):
    """The waves of a workgroup share the products of a tile out; none multiplies what another does.
    Counts of instructions: exact."""
    for kernel, row in table.rows(operator, case.name, arch).items():
        assert row.get("mac_redundancy", 1.0) == 1.0, kernel


@pytest.mark.parametrize(
    ("operator", "case", "arch"), [each for each in EVERY if each.values[2] == "gfx950"]
)
def test_targets(operator: str, case: Case, arch: str):
    """Workgroups a compute unit and, where llvm-mca is installed, issue cycles a unit."""
    for kernel, row in table.rows(operator, case.name, arch).items():
        name = kernel.split("#")[0]
        assert row["wg_per_cu"] >= case.workgroups.get(name, 1), (kernel, row["vgpr"], row["lds"])
        if name in case.issue and row["mca_issue_cycles"] is not None:
            assert row["simd_issue_cycles_per_unit"] <= case.issue[name], kernel


@pytest.mark.parametrize("operator", operators())
def test_table_is_as_kept(operator: str):
    """Registers, LDS, occupancy, matrix instructions and cycles are those of
    golden/<operator>.json."""
    kept = table.read(operator)
    if kept["versions"].get("triton") != table.versions()["triton"]:
        pytest.skip(
            f"the table is of Triton {kept['versions'].get('triton')}, this is"
            f" {table.versions()['triton']}"
        )
    now = {
        f"{case.name} | {arch} | {kernel}": row
        for case in operators()[operator]
        for arch in case.archs
        for kernel, row in table.rows(operator, case.name, arch).items()
    }
    lines = table.moved(kept, now)
    assert not lines, "\n".join(
        ["the compile table moved; if that is meant: python tests/compile/renew.py", *lines]
    )


def test_cycle_columns():
    """The cycle columns are compared only by the llvm-mca that made them."""
    if table.versions()["llvm_mca"] is None:
        pytest.skip("llvm-mca 22 is not installed: the cycle columns are not compared")
    without = [name for name in operators() if not table.read(name)["versions"].get("llvm_mca")]
    if without:
        pytest.skip(f"made where there was no llvm-mca 22, renew them: {', '.join(without)}")
