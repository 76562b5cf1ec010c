"""What is broken on purpose is found, and what is sound is not called broken."""

from __future__ import annotations

from collections import Counter

import assembled
import mutants
import pytest
import sample_kernels as kernels
import torch

from gfx950 import triton_driver
from gfx950.machine import Failed, Options, Program
from gfx950.races import Alignment, GlobalRaces, LocalRaces, Trace
from gfx950.triton_driver import executing

WATCHED = Options(watches=(LocalRaces, GlobalRaces))
LEAST = {
    "wait for vector memory": 1.0,
    "wait for LDS": 0.8,
    "barrier": 0.8,
    "s_nop": 0.8,
    "LDS offset": 0.8,
}
"""Share of what is taken out that is found. The rest is not needed where it stands: Triton puts
barriers that an earlier one makes redundant, LLVM an s_nop behind every packed sum; a row maximum
read from another place changes no softmax."""


@pytest.mark.parametrize("case", mutants.CASES)
def test_what_is_taken_out_is_missed(case: str):
    """Some of each kind, chosen by chance; `make test-isa` takes out all."""
    total, found = Counter(), Counter()
    for _, kind, _, who in mutants.mutants(case, lambda kind: True, most=5):
        total[kind] += 1
        found[kind] += who != "nobody"
    assert total
    for kind, count in total.items():
        missed = count - found[kind]
        assert missed <= max(1, round(count * (1 - LEAST[kind]))), (kind, count, missed)


def test_a_missing_mask_names_the_source_line():
    x, y = torch.zeros(1000), torch.zeros(2048)
    with executing(), pytest.raises(Failed, match=r"sample_kernels\.py:\d+: .* are in no buffer"):
        kernels.unmasked[(2,)](x, y, B=1024)


def kinds(launches) -> set[str]:
    return {found.kind for each in launches for found in each.told.findings}


def test_workgroups_that_meet():
    """In one place, in one run in lockstep, whichever comes first."""
    y = torch.zeros(64, dtype=torch.int32)
    with executing(options=WATCHED) as launches:
        kernels.meet[(2,)](y, B=64)
    assert kinds(launches) == {"global race"}
    assert "sample_kernels.py" in str(launches[0].told.findings[0])


@pytest.mark.parametrize("together", [True, False])
def test_atomics_order_workgroups(together: bool):
    """The last to arrive may read what all wrote; who asks nobody may not."""
    options = Options(together=together, watches=(GlobalRaces,))
    for kernel, races in ((kernels.last_sums, set()), (kernels.hasty_sums, {"global race"})):
        parts, y = torch.zeros(16), torch.zeros(1)
        with executing(options=options) as launches:
            kernel[(16,)](parts, torch.zeros(1, dtype=torch.int32), y, P=16)
        assert kinds(launches) == races
        assert y.item() == 16 * 17 / 2 or races


def test_registers_that_nobody_set():
    """A kernel without a move that clears a register, one at a time: the stored value, address or
    branch that depends on it is named. (Others leave an older value of the kernel's own: that is
    defined, and wrong.)"""
    case = next(c for c in mutants.executions.all_cases() if c.name == mutants.CASES[2])
    sound = mutants.executions.execute(case).launches[0]
    key = sound.hsaco, sound.kernel
    program = sound.program
    moves = [
        i
        for i in program.instructions.values()
        if i.name == "v_mov_b32" and "DPP" not in i.form and 128 <= i.get("src0") < 256
    ]
    found = []
    for i in moves[:8]:
        triton_driver._programs[key] = mutants.broken(program, i.address)
        traces = [Trace(), Trace()]
        try:
            for seed, trace in enumerate(traces):
                options = Options(seed=seed, watches=(lambda t=trace: t,))
                mutants.executions.execute(case, options)
            found += traces[0].difference(traces[1])
        except Failed:  # an address that is in no buffer
            continue
        finally:
            triton_driver._programs[key] = program
    assert found and all(".py:" in each.line for each in found)


def test_alignment():
    w = assembled.waves()
    watch = Alignment()
    w.shared.watches = (watch,)
    w.vector[1] = 16
    assembled.run("ds_read_b128 v[4:7], v1", w)
    assert not watch.findings()
    assembled.run("ds_read_b128 v[4:7], v1 offset:8\nds_write_b64 v1, v[4:5] offset:4", w)
    assert [found.kind for found in watch.findings()] == ["alignment"] * 2


def program_of(text: str) -> Program:
    """A program of assembly; its kernel has one wave."""
    code = assembled.assemble_bytes(text + "\ns_endpgm")
    kernel = assembled.Kernel("text", "gfx950", code, 0, 0, accumulators_at=256)
    return Program(kernel)


WAIT_STATES = [
    # what needs wait states, how many, and what comes too soon
    ("v_exp_f32 v1, v0", 1, "v_add_f32 v2, v1, v1"),
    ("v_mov_b32 v1, v0", 2, "v_mov_b32_dpp v2, v1 row_shr:1 row_mask:0xf bank_mask:0xf"),
    ("v_mov_b32 v1, v0", 1, "v_readfirstlane_b32 s4, v1"),
    ("v_mov_b32 v1, v0", 2, "v_permlane32_swap_b32 v1, v2"),
    ("v_mov_b32 v4, v0", 2, "v_mfma_f32_16x16x32_bf16 v[8:11], v[4:7], v[12:15], 0"),
    ("v_readfirstlane_b32 s4, v1", 5, "global_load_dword v2, v3, s[4:5]"),
    ("v_readfirstlane_b32 s4, v1", 2, "v_add_f32 v2, s4, v1"),
    ("v_readfirstlane_b32 s4, v1", 4, "v_readlane_b32 s5, v2, s4"),
    ("v_cmp_eq_u32 vcc, v0, v1", 4, "v_div_fmas_f32 v2, v1, v1, v1"),
    ("global_store_dwordx4 v0, v[4:7], s[2:3]", 2, "v_mov_b32 v6, v1"),
    ("v_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], 0", 8, "v_mov_b32 v12, v2"),
    ("v_mfma_f32_32x32x16_bf16 v[0:15], v[16:19], v[20:23], 0", 12, "v_mov_b32 v30, v2"),
    ("v_mfma_f32_32x32x16_bf16 v[32:47], v[16:19], v[20:23], v[0:15]", 7, "v_mov_b32 v3, v50"),
    ("v_mov_b32_sdwa v1, v0 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD", 1,
     "v_mov_b32 v2, v1"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "states", "second"), WAIT_STATES)
def test_wait_states(first: str, states: int, second: str):
    """One too few is found, exactly enough is not."""
    enough = f"{first}\ns_nop {states - 1}\n{second}"
    assert not mutants.check_wait_states(program_of(enough))
    short = f"{first}\n" + (f"s_nop {states - 2}\n" if states > 1 else "") + second
    assert len(mutants.check_wait_states(program_of(short))) == 1


WAITS = [
    ("global_load_dword v1, v0, s[2:3]", "s_waitcnt vmcnt(0)", "v_mov_b32 v2, v1"),
    ("ds_read_b64 v[2:3], v0", "s_waitcnt lgkmcnt(0)", "v_mov_b32 v4, v3"),
    ("s_load_dwordx2 s[4:5], s[2:3], 0x0", "s_waitcnt lgkmcnt(0)", "s_mov_b32 s6, s5"),
    # of two accesses in order the first may be waited for alone
    ("ds_read_b32 v2, v0\nds_read_b32 v3, v1", "s_waitcnt lgkmcnt(1)", "v_mov_b32 v4, v2"),
    # on one of two paths
    (
        "s_cbranch_scc0 2\nglobal_load_dword v1, v0, s[2:3]",
        "s_waitcnt vmcnt(0)",
        "v_mov_b32 v1, v3",
    ),
]


@pytest.mark.parametrize(("load", "wait", "use"), WAITS)
def test_waits(load: str, wait: str, use: str):
    assert not mutants.check_waits(program_of(f"{load}\n{wait}\n{use}"))
    assert len(mutants.check_waits(program_of(f"{load}\n{use}"))) == 1


def test_a_scalar_load_under_way_makes_partial_waits_worthless():
    """Both share a counter, and scalar loads arrive in any order."""
    text = (
        "ds_read_b32 v2, v0\ns_load_dword s4, s[2:3], 0x0\ns_waitcnt lgkmcnt(1)\nv_mov_b32 v4, v2"
    )
    assert len(mutants.check_waits(program_of(text))) == 1
