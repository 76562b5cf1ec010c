"""Reading what a loop asks of memory, on loops whose answer is counted by hand."""

from __future__ import annotations

from assembly import hot_loop, nvidia_occupancy
from chips import CHIPS, unpriced_cycles
from memory import (
    amd_bytes_in_flight,
    amd_local_bytes,
    sass,
    sass_bytes_in_flight,
    sass_hot_loop,
    sass_local_bytes,
    sass_macs,
)

SERIAL = [
    "global_load_dwordx4 v[0:3], v4, s[0:1]",
    "s_waitcnt vmcnt(0)",
    "global_load_dwordx4 v[0:3], v4, s[0:1]",
    "s_waitcnt vmcnt(0)",
]
AHEAD = [
    "s_waitcnt vmcnt(1)",
    "global_load_dwordx4 v[0:3], v4, s[0:1]",
    "global_load_ubyte v5, v4, s[0:1]",
    "s_waitcnt lgkmcnt(0)",
]


def test_bytes_in_flight_follow_the_waits():
    assert amd_bytes_in_flight(SERIAL) == 16 * 64
    # The byte of the pass before is still on its way.
    assert amd_bytes_in_flight(AHEAD) == (1 + 16 + 1) * 64
    assert amd_bytes_in_flight(["global_store_dwordx4 v4, v[0:3], s[0:1]"]) == 0


def test_bytes_of_local_memory():
    body = [
        "ds_read_b128 v[0:3], v9",
        "ds_read2_b64 v[0:3], v9 offset1:4",
        "ds_read_b64_tr_b16 v[0:1], v9",
        "ds_write2st64_b32 v9, v0, v1",
        "ds_write_b8 v9, v0",
        "v_add_f32 v0, v1, v2",
    ]
    assert amd_local_bytes(body) == (16 + 16 + 8 + 8 + 1) * 64


def test_fp8_products_take_twice_what_the_tool_says():
    """32x32x64: 65536 multiply-adds at 1024 a clock are 64 clocks, the tool's 8 cycles are 32."""
    fp8 = "v_mfma_f32_32x32x64_f8f6f4 v[0:15], v[32:39], v[40:47], v[0:15]"
    assert unpriced_cycles(fp8) == 8
    assert unpriced_cycles(fp8 + " cbsz:4 blgp:4") == 0
    assert unpriced_cycles(fp8 + " blgp:4") == 8, "FP8 by FP4 is as slow as FP8"
    assert unpriced_cycles(fp8.replace("32x32x64", "16x16x128")) == 4
    assert unpriced_cycles("v_mfma_f32_32x32x16_bf16 v[0:15], v[0:3], v[4:7], v[0:15]") == 0


LISTING = """
		Function : kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   LDG.E R8, desc[UR4][R2.64+0x10] ;  /* 0x0 */
        /*0030*/                   LDSM.16.M88.4 R12, [R9] ;  /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R16, R4, R12, R16 ;  /* 0x0 */
        /*0050*/              @!P0 BRA 0x10 ;  /* 0x0 */
        /*0060*/                   STS.64 [R9], R16 ;  /* 0x0 */
        /*0070*/                   BRA 0x70;  /* 0x0 */
"""


def test_the_listing_of_an_nvidia_kernel():
    code = sass(LISTING)
    assert len(code) == 8 and code[1] == (0x10, "LDG.E.128 R4, desc[UR4][R2.64]")
    body = sass_hot_loop(code)
    assert body[0].startswith("LDG.E.128") and body[-1] == "BRA 0x10"
    assert sum(map(sass_macs, body)) == 16 * 8 * 16
    # R4 is used by the product; R8 never, and waits on.
    assert sass_bytes_in_flight(body) == (16 + 4) * 32
    assert sass_local_bytes(body) == 16 * 32
    assert sass_macs("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8]") == 64 * 128 * 16 // 4


def test_asynchronous_copies_end_with_their_group():
    copy = "LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64]"
    wait = "DEPBAR.LE SB0, 0x1"
    assert sass_bytes_in_flight([copy, "LDGDEPBAR", wait]) == 2 * 16 * 32


def test_a_block_laid_out_of_line_is_no_loop():
    """What is left of a drained pipeline stands behind the kernel's end and jumps back into it."""
    once = "v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]"
    loop = [once, "s_cbranch_scc1 .LBB0_1"]
    listing = [
        *(".LBB0_1:", *loop, "s_cbranch_scc0 .LBB0_3"),
        *(".LBB0_2:", once, "s_endpgm"),
        *(".LBB0_3:", once, once, "s_branch .LBB0_2"),
        ".Lfunc_end0:",
    ]
    assert hot_loop("\n".join(listing)) == loop


def test_occupancy_of_an_sm():
    chip = CHIPS["sm_90"]
    assert nvidia_occupancy(254, 51200, 8, chip) == 1, "254 registers of 256 threads fill it"
    assert nvidia_occupancy(128, 1024, 4, chip) == 4
    assert nvidia_occupancy(32, 100 << 10, 4, chip) == 2
    assert nvidia_occupancy(16, 0, 1, chip) == 32
