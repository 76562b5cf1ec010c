"""Lanes that see each other, and every width and form of memory access, against tables and bytes
written out here."""

from __future__ import annotations

import assembled
import numpy as np
import pytest
from assembled import LANES

from gfx950.machine import Unknown
from gfx950.waves import Fault, Memory

LANE = np.arange(LANES)


def dpp_source(control: str, lane: int) -> int | None:
    """The lane that a DPP control takes from (CDNA ISA, "DPP_CTRL Enumerations")."""
    row, within = lane // 16 * 16, lane % 16
    name, _, value = control.partition(":")
    if name == "quad_perm":
        return lane // 4 * 4 + eval(value)[lane % 4]
    count = int(value or 0)
    return {
        "row_shl": lambda: row + within + count if within + count < 16 else None,
        "row_shr": lambda: row + within - count if within >= count else None,
        "row_ror": lambda: row + (within - count) % 16,
        "wave_shl": lambda: lane + 1 if lane < 63 else None,
        "wave_rol": lambda: (lane + 1) % 64,
        "wave_shr": lambda: lane - 1 if lane else None,
        "wave_ror": lambda: (lane - 1) % 64,
        "row_mirror": lambda: row + 15 - within,
        "row_half_mirror": lambda: lane // 8 * 8 + 7 - lane % 8,
        "row_bcast": lambda: {15: row - 1 if row else None, 31: 31 if lane > 31 else None}[count],
        "row_newbcast": lambda: row + count,
    }[name]()


CONTROLS = [
    "quad_perm:[1,0,3,2]", "quad_perm:[3,3,1,0]",
    "row_shl:1", "row_shl:15", "row_shr:1", "row_shr:8",
    "row_ror:1", "row_ror:8", "wave_shl:1", "wave_rol:1", "wave_shr:1", "wave_ror:1", "row_mirror",
    "row_half_mirror", "row_bcast:15", "row_bcast:31", "row_newbcast:3",
]  # fmt: skip


@pytest.mark.parametrize("bound", [False, True], ids=["", "bound_ctrl"])
@pytest.mark.parametrize("control", CONTROLS)
def test_dpp(control: str, bound: bool):
    """A lane without a source, or whose source is not active, is not written, or takes 0 with
    bound_ctrl; masked rows and banks are not written."""
    w = assembled.waves()
    w.set_mask(126, (LANE % 5 != 2)[None])
    source, old, exec_ = w.vector[1, 0].copy(), w.vector[4, 0].copy(), LANE % 5 != 2
    text = f"v_mov_b32_dpp v4, v1 {control} row_mask:0xb bank_mask:0x7"
    assembled.run(text + (" bound_ctrl:0" if bound else ""), w)
    for lane in range(LANES):
        at = dpp_source(control, lane)
        there = at is not None and exec_[at]
        masked = 0xB >> lane // 16 & 1 and 0x7 >> lane // 4 % 4 & 1
        if not exec_[lane] or not masked or not (there or bound):
            want = old[lane]
        else:
            want = source[at] if there else 0
        assert w.vector[4, 0, lane] == want, lane


@pytest.mark.parametrize("unused", ["PAD", "SEXT", "PRESERVE"])
@pytest.mark.parametrize("select", ["BYTE_0", "BYTE_1", "BYTE_3", "WORD_0", "WORD_1", "DWORD"])
def test_sdwa(select: str, unused: str):
    """Operands and results that are parts of registers, against Python's integers."""
    w = assembled.waves()
    a, b, old = (w.vector[n, 0].tolist() for n in (1, 2, 4))
    assembled.run(
        f"v_add_u32_sdwa v4, sext(v1), v2 dst_sel:{select} dst_unused:UNUSED_{unused}"
        " src0_sel:BYTE_2 src1_sel:WORD_1",
        w,
    )
    place = {"DWORD": (0, 32)}.get(select) or (
        (8 * int(select[-1]), 8) if select[0] == "B" else (16 * int(select[-1]), 16)
    )
    shift, bits = place
    for lane in range(LANES):
        byte = a[lane] >> 16 & 255
        total = (byte - 256 * (byte > 127)) + (b[lane] >> 16)
        part = total & (1 << bits) - 1
        want = part << shift
        if unused == "PRESERVE":
            want |= old[lane] & ~((1 << bits) - 1 << shift)
        if unused == "SEXT" and part >> bits - 1:
            want |= 0xFFFFFFFF & ~((1 << shift + bits) - 1)
        assert w.vector[4, 0, lane] == want & 0xFFFFFFFF, lane


def test_exchanges():
    w = assembled.waves()
    w.set_mask(126, (LANE != 9)[None])
    w.vector[1, 0] = (LANE * 7 + 3) % 64 * 4
    value = w.vector[2, 0].copy()
    assembled.run("ds_bpermute_b32 v4, v1, v2\nds_permute_b32 v5, v1, v2", w)
    pulled, pushed = np.where((LANE * 7 + 3) % 64 == 9, 0, value[(LANE * 7 + 3) % 64]), {}
    for lane in range(LANES):
        if lane != 9:
            pushed[(lane * 7 + 3) % 64] = value[lane]
    for lane in range(LANES):
        if lane != 9:
            assert w.vector[4, 0, lane] == pulled[lane]
            assert w.vector[5, 0, lane] == pushed.get(lane, 0)
    w = assembled.waves()
    a, b = w.vector[1, 0].copy(), w.vector[2, 0].copy()
    assembled.run("v_permlane32_swap_b32 v1, v2", w)
    assert (w.vector[1, 0] == np.concatenate([a[:32], b[:32]])).all()
    assert (w.vector[2, 0] == np.concatenate([a[32:], b[32:]])).all()
    w = assembled.waves()
    assembled.run("v_permlane16_swap_b32 v1, v2", w)
    assert (w.vector[1, 0] == np.concatenate([a[:16], b[:16], a[32:48], b[32:48]])).all()
    assert (
        w.vector[2, 0]
        == np.concatenate([a[16:32], a[48:], b[16:32], b[48:]])[
            np.concatenate([LANE[:16], LANE[32:48], LANE[16:32], LANE[48:]])
        ]
    ).all()
    w = assembled.waves()
    assembled.run(
        "ds_swizzle_b32 v4, v1 offset:swizzle(QUAD_PERM,2,3,0,1)\n"
        "ds_swizzle_b32 v5, v1 offset:swizzle(SWAP,8)\n"
        "ds_swizzle_b32 v6, v1 offset:swizzle(BROADCAST,4,1)\n"
        "ds_swizzle_b32 v7, v1 offset:swizzle(REVERSE,16)",
        w,
    )  # fmt: skip
    assert (w.vector[4, 0] == a[LANE ^ 2]).all() and (w.vector[5, 0] == a[LANE ^ 8]).all()
    assert (w.vector[6, 0] == a[LANE // 4 * 4 + 1]).all()
    assert (w.vector[7, 0] == a[LANE // 16 * 16 + 15 - LANE % 16]).all()
    assembled.run("v_readlane_b32 s8, v1, 17\nv_writelane_b32 v9, s8, 3", w)
    assembled.run("v_mbcnt_lo_u32_b32 v10, -1, 0\nv_mbcnt_hi_u32_b32 v10, -1, v10", w)
    assert w.scalar[8, 0] == a[17] == w.vector[9, 0, 3] and (w.vector[10, 0] == LANE).all()


LOADS = [
    ("ubyte", 1, False), ("sbyte", 1, True), ("ushort", 2, False), ("sshort", 2, True),
    ("dword", 4, False), ("dwordx2", 8, False), ("dwordx3", 12, False), ("dwordx4", 16, False),
]  # fmt: skip


def with_memory():
    """(waves, address of 4 KiB, its bytes): s[2:3] is the address, s[4:7] a buffer of 2 KiB."""
    memory = Memory(1 << 14)
    address = memory.allocate(4096)
    w = assembled.waves(memory=memory)
    w.scalar[2], w.scalar[3] = address & 0xFFFFFFFF, address >> 32
    w.scalar[4:8, 0] = address & 0xFFFFFFFF, address >> 32, 2048, 0x27000
    return w, address, memory.view(address, 4096)


def registers_of(w, first: int, size: int) -> list[bytes]:
    """Bytes that each lane's registers hold."""
    count = max(1, size // 4)
    return [w.vector[first : first + count, 0, lane].tobytes() for lane in range(LANES)]


@pytest.mark.parametrize("form", ["global", "address", "buffer", "lds", "scratch"])
@pytest.mark.parametrize(("kind", "size", "signed"), LOADS)
def test_loads_and_stores(kind: str, size: int, signed: bool, form: str):
    """All lanes at odd places; what is loaded is stored elsewhere, and only that changes."""
    w, address, octets = with_memory()
    stride = size if form != "scratch" else 0
    w.vector[1, 0] = LANE * max(stride, 4) + (0 if size >= 4 else LANE % 2)
    if form == "scratch":
        w.vector[1, 0] = 4
        octets, first = w.shared.scratch, LANE * 64 + 4
    elif form == "lds":
        octets, first = w.shared.lds, w.vector[1, 0].astype(int)
    else:
        first = w.vector[1, 0].astype(int)
    if form == "address":
        w.vector[2, 0] = (address + first) & 0xFFFFFFFF
        w.vector[3, 0] = (address + first) >> 32
    before, far = octets.copy(), 16 if form == "scratch" else 1024
    target = "v20" if size <= 4 else f"v[20:{19 + size // 4}]"
    bits = {1: "u8", 2: "u16", 4: "b32", 8: "b64", 12: "b96", 16: "b128"}[size]
    bits = bits.replace("u", "i") if signed else bits
    store = {1: "byte", 2: "short"}.get(size, kind)
    text = {
        "global": f"global_load_{kind} {target}, v1, s[2:3]\n"
        f"global_store_{store} v1, {target}, s[2:3] offset:{far}",
        "address": f"global_load_{kind} {target}, v[2:3], off\n"
        f"global_store_{store} v[2:3], {target}, off offset:{far}",
        "buffer": f"buffer_load_{kind} {target}, v1, s[4:7], 0 offen\n"
        f"buffer_store_{store} {target}, v1, s[4:7], 0 offen offset:{far}",
        "lds": f"ds_read_{bits} {target}, v1\n"
        f"ds_write_b{8 * size} v1, {target} offset:{far}",
        "scratch": f"scratch_load_{kind} {target}, v1, off\n"
        f"scratch_store_{store} v1, {target}, off offset:{far}",
    }[form]  # fmt: skip
    assembled.run(text, w)
    for lane, got in enumerate(registers_of(w, 20, size)):
        want = before[first[lane] : first[lane] + size].tobytes()
        if size < 4:
            want = int.from_bytes(want, "little", signed=signed).to_bytes(
                4, "little", signed=signed
            )
        assert got == want, lane
    want = before.copy()
    for lane in range(LANES):
        want[first[lane] + far : first[lane] + far + size] = before[
            first[lane] : first[lane] + size
        ]
    assert (octets == want).all()


def test_halves_keep_the_other_half():
    w, address, octets = with_memory()
    old = w.vector[20:24, 0].copy()
    w.vector[1, 0] = LANE * 2
    short = octets[:128].view(np.uint16).astype(np.uint32)
    assembled.run(
        "global_load_short_d16 v20, v1, s[2:3]\nglobal_load_short_d16_hi v21, v1, s[2:3]\n"
        "global_store_short_d16_hi v1, v22, s[2:3] offset:512\n"
        "ds_write_b16_d16_hi v1, v23",
        w,
    )
    assert (w.vector[20, 0] == (old[0] & 0xFFFF0000 | short)).all()
    assert (w.vector[21, 0] == (old[1] & 0xFFFF | short << 16)).all()
    assert (octets[512:640].view(np.uint16) == old[2] >> 16).all()
    assert (w.shared.lds[:128].view(np.uint16) == old[3] >> 16).all()


def test_two_at_once():
    """read2 and write2: offsets in elements, or in 64 of them."""
    w = assembled.waves(lds=8192)
    w.vector[1, 0] = LANE * 8
    before = w.shared.lds.copy().view(np.uint64)
    assembled.run(
        "ds_read2_b64 v[4:7], v1 offset0:3 offset1:5\nds_read2st64_b64 v[8:11], v1 offset1:2", w
    )
    pair = lambda n: w.vector[n, 0] | w.vector[n + 1, 0].astype(np.uint64) << 32  # noqa: E731
    assert (pair(4) == before[LANE + 3]).all() and (pair(6) == before[LANE + 5]).all()
    assert (pair(8) == before[LANE]).all() and (pair(10) == before[LANE + 128]).all()
    w.vector[1, 0] = LANE * 4
    assembled.run("ds_write2_b32 v1, v4, v5 offset0:64 offset1:128", w)
    words = w.shared.lds.view(np.uint32)
    assert (words[64:128] == w.vector[4, 0]).all() and (words[128:192] == w.vector[5, 0]).all()


@pytest.mark.parametrize("bits", [16, 8])
def test_transposed_reads(bits: int):
    """16 lanes read a block of rows of 16 numbers, 8 bytes a lane in memory's order, and each gets
    a column: element j of lane n is number n of row j. Other lanes have blocks of their own."""
    w = assembled.waves()
    groups = [1024, 0, 2048, 256]  # where the blocks of lanes 0 to 15, 16 to 31, ... begin
    w.vector[1, 0] = [groups[lane // 16] + lane % 16 * 8 for lane in range(LANES)]
    before = w.shared.lds.tobytes()
    assembled.run(f"ds_read_b64_tr_b{bits} v[4:5], v1 offset:512", w)
    size = bits // 8
    for lane in range(LANES):
        got = w.vector[4:6, 0, lane].tobytes()
        for j in range(64 // bits):
            at = groups[lane // 16] + 512 + (16 * j + lane % 16) * size
            assert got[j * size : (j + 1) * size] == before[at : at + size], (lane, j)


@pytest.mark.parametrize("text", ["ds_read_b64_tr_b4 v[4:5], v1", "ds_read_b96_tr_b6 v[4:6], v1"])
def test_transposed_reads_that_are_missing(text: str):
    """They are named, not taken for plain reads."""
    with pytest.raises(Unknown, match=text.split()[0]):
        assembled.run(text, assembled.waves())


def test_buffers_end():
    """Past the end a load gives 0 and a store does nothing; a register below 0 and a constant are
    added in 32 bits."""
    w, address, octets = with_memory()
    w.vector[1, 0] = 2048 - 4 * LANE.astype(np.uint32)
    before = octets.copy()
    assembled.run("buffer_load_dword v4, v1, s[4:7], 0 offen", w)
    words = before.view(np.uint32)
    assert w.vector[4, 0, 0] == 0 and (w.vector[4, 0, 1:] == words[512 - LANE[1:]]).all()
    assembled.run("buffer_store_dword v2, v1, s[4:7], 0 offen", w)
    assert (octets[2048:] == before[2048:]).all()
    w.vector[1, 0] = (4 * LANE - 512) % 2**32
    assembled.run("buffer_load_dword v5, v1, s[4:7], 0 offen offset:512", w)
    assert (w.vector[5, 0] == octets[:256].view(np.uint32)).all()


def test_loads_into_lds():
    """At M0 + offset + 4 · lane, or 16 · lane."""
    w, address, octets = with_memory()
    w.scalar[124], w.vector[1, 0] = 256, LANE * 16
    w.vector[4, 0], w.vector[5, 0] = (address + LANE * 16) & 0xFFFFFFFF, address >> 32
    assembled.run("global_load_lds_dwordx4 v[4:5], off offset:16", w)
    assert (w.shared.lds[272 : 272 + 1024] == octets[16 : 16 + 1024]).all()
    assembled.run("buffer_load_dword v1, s[4:7], 0 offen offset:64 lds", w)
    got = w.shared.lds[320 : 320 + 256].view(np.uint32)
    assert (got == octets.view(np.uint32)[16 + 4 * LANE]).all()


ATOMICS = [
    ("add", "add_u32", lambda old, new: (old + new) % 2**32),
    ("sub", "sub_u32", lambda old, new: (old - new) % 2**32),
    ("umax", "max_u32", max), ("umin", "min_u32", min),
    ("and", "and_b32", lambda old, new: old & new), ("or", "or_b32", lambda old, new: old | new),
    ("xor", "xor_b32", lambda old, new: old ^ new), ("swap", "wrxchg_b32", lambda old, new: new),
    ("smax", "max_i32", lambda old, new: max((old, new), key=lambda x: x - 2**32 * (x >> 31))),
    ("smin", "min_i32", lambda old, new: min((old, new), key=lambda x: x - 2**32 * (x >> 31))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "in_lds", "function"), ATOMICS, ids=lambda x: str(x)[:8])
def test_atomics(name: str, in_lds: str, function):
    """Four lanes at each place, one after another; each is given what it found."""
    for local in (False, True):
        w, _, octets = with_memory()
        octets = w.shared.lds if local else octets
        w.vector[1, 0] = LANE % 16 * 4
        values, cells = w.vector[2, 0].tolist(), octets[:64].view(np.uint32).tolist()
        operation, _, kind = in_lds.partition("_")
        assembled.run(
            f"ds_{operation}_rtn_{kind} v4, v1, v2"
            if local
            else f"global_atomic_{name} v4, v1, v2, s[2:3] sc0",
            w,
        )
        for lane in range(LANES):
            assert w.vector[4, 0, lane] == cells[lane % 16], lane
            cells[lane % 16] = function(cells[lane % 16], values[lane])
        assert octets[:64].view(np.uint32).tolist() == cells


def test_compare_and_swap():
    w, _, octets = with_memory()
    w.vector[1, 0] = LANE * 8
    before = octets.copy().view(np.uint64)[:LANES]
    w.vector[2, 0], w.vector[3, 0] = 7, 8  # new value, then what must be there
    w.vector[4, 0] = before & 0xFFFFFFFF
    w.vector[5, 0] = np.where(LANE % 2, before >> 32, 0)
    assembled.run("global_atomic_cmpswap_x2 v[8:9], v1, v[2:5], s[2:3] sc0", w)
    assert (w.vector[8, 0] == before & 0xFFFFFFFF).all() and (w.vector[9, 0] == before >> 32).all()
    want = np.where(LANE % 2, np.uint64(8 << 32 | 7), before)
    assert (octets.view(np.uint64)[:LANES] == want).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("global_load_dword v4, v1, s[2:3] offset:4092", "are in no buffer"),
        ("ds_read_b64 v[4:5], v1 offset:4092", "bytes at LDS offset"),
        ("scratch_load_dword v4, v1, off offset:60", "scratch offset"),
        ("global_atomic_add v1, v2, s[2:3] offset:2", "do not divide"),
    ],
)
def test_faults(text: str, message: str):
    w, _, _ = with_memory()
    w.vector[1, 0] = 4
    with pytest.raises(Fault, match=message):
        assembled.run(text, w)


def test_inactive_lanes_do_nothing():
    w, _, octets = with_memory()
    w.set_mask(126, (LANE == 5)[None])
    w.vector[1, 0] = 0xFFFF0000  # in no buffer
    w.vector[1, 0, 5] = 8
    before, old = octets.copy(), w.vector[4, 0].copy()
    assembled.run("global_load_dword v4, v1, s[2:3]\nglobal_store_dword v1, v2, s[2:3]", w)
    assert (np.flatnonzero(w.vector[4, 0] != old) == [5]).all()
    assert set(np.flatnonzero(octets != before)) <= set(range(8, 12))
