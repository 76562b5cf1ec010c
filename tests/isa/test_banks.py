"""LDS bank conflicts against patterns counted by hand."""

from __future__ import annotations

import dataclasses

import assembled
import numpy as np
import pytest
from assembled import LANES

from gfx950.banks import BankConflicts

LANE = np.arange(LANES)


def counted(text: str, at, active=LANE >= 0) -> BankConflicts:
    """What is counted of one instruction with lane addresses `at` in v1."""
    w = assembled.waves(lds=1 << 16)
    w.shared.watches = (watch := BankConflicts(),)
    w.set_mask(126, np.asarray(active)[None])
    w.vector[1, 0] = at
    assembled.run(text, w)
    return watch


def quarters(*banks: int) -> np.ndarray:
    """Addresses of 16 bytes a lane: the quarter of 64 banks that each group of 4 lanes reads, of
    the first 32 lanes and the others alike, each group in a row of its own."""
    return LANE // 4 * 256 + np.array(banks * 2)[LANE // 4] * 64 + LANE % 4 * 16


PATTERNS = [
    # instruction, addresses, phases, cycles beyond them
    ("ds_read_b32 v4, v1", LANE * 4, 2, 0),  # 32 words in 32 banks, twice
    ("ds_read_b32 v4, v1", LANE * 0, 2, 0),  # one word for all
    ("ds_read_b32 v4, v1", LANE * 8, 2, 2),  # words 0, 2, ..., 62: two in each even bank
    ("ds_read_b32 v4, v1", LANE * 128, 2, 62),  # 32 words in bank 0
    ("ds_read_b32 v4, v1", LANE * 132, 2, 0),  # padded by a word: bank of lane n is n
    ("ds_read_u8 v4, v1", LANE, 2, 0),  # 4 lanes a word
    ("ds_read_u16 v4, v1", LANE * 64, 2, 30),  # banks 0 and 16, 16 words each
    ("ds_write_b32 v1, v4", LANE * 256, 2, 62),
    ("ds_read_b64 v[4:5], v1", LANE * 8, 2, 0),  # 32 lanes, 64 banks
    ("ds_read_b64 v[4:5], v1", LANE * 16, 2, 2),  # each second pair of banks, twice
    ("ds_read_b64 v[4:5], v1", LANE * 256, 2, 62),
    ("ds_read_b64_tr_b16 v[4:5], v1", LANE * 128, 2, 30),  # banks 0, 1 and 32, 33
    ("ds_write_b64 v1, v[4:5]", LANE * 8, 4, 0),  # 16 lanes, 32 banks
    ("ds_write_b64 v1, v[4:5]", LANE * 128, 4, 60),
    ("ds_read_b128 v[4:7], v1", LANE * 16, 4, 0),  # 16 lanes, 64 banks
    ("ds_read_b128 v[4:7], v1", LANE * 256, 4, 60),
    # Four lanes fill a quarter of the banks; by groups of four, the quarters that make both phases
    # of a half fill all banks, and those that would if its lanes 0 to 15 were one phase.
    ("ds_read_b128 v[4:7], v1", quarters(0, 0, 1, 1, 2, 2, 3, 3), 4, 0),
    ("ds_read_b128 v[4:7], v1", quarters(0, 1, 2, 3, 1, 0, 3, 2), 4, 4),
    ("ds_write_b128 v1, v[4:7]", LANE * 16, 8, 0),  # 8 lanes, 32 banks
    ("ds_write_b128 v1, v[4:7]", LANE * 128, 8, 56),
    ("ds_read2_b64 v[4:7], v1 offset1:1", LANE * 16, 8, 8),  # two accesses, 16 lanes, 32 banks
    ("ds_read2_b32 v[4:5], v1 offset1:1", LANE * 8, 4, 4),
    ("ds_add_u32 v1, v4", LANE * 0, 2, 62),  # each in turn
]  # fmt: skip


@pytest.mark.parametrize(("text", "at", "phases", "more"), PATTERNS)
def test_patterns(text: str, at, phases: int, more: int):
    found = counted(text, at)
    assert (found.phases, found.conflicts) == (phases, more)


PHASES = {
    # which lanes an MI355X serves together (HipKittens, arXiv 2511.08083, table 5), and its banks
    "ds_read_b128 v[4:7], v1": (["0-3 12-15 20-27", "4-11 16-19 28-31", "32-35 44-47 52-59",
                                 "36-43 48-51 60-63"], 64),
    "ds_read_b96 v[4:6], v1": (["0-3 20-23", "4-7 16-19", "8-11 28-31", "12-15 24-27",
                                "32-35 52-55", "36-39 48-51", "40-43 60-63", "44-47 56-59"], 32),
    "ds_write_b64 v1, v[4:5]": (["0-15", "16-31", "32-47", "48-63"], 32),
    "ds_read_b64 v[4:5], v1": (["0-31", "32-63"], 64),
}  # fmt: skip


@pytest.mark.parametrize("text", PHASES)
def test_two_lanes_at_a_time(text: str):
    """As they were measured: two lanes at two words of one bank disturb each other where they are
    of one phase, and at two banks nowhere."""
    groups, banks = PHASES[text]
    phase = {}
    for number, group in enumerate(groups):
        for span in group.split():
            first, last = map(int, span.split("-"))
            phase |= dict.fromkeys(range(first, last + 1), number)
    for a in range(0, LANES, 21):
        for b in set(range(LANES)) - {a}:
            pair = (LANE == a) | (LANE == b)
            same = counted(text, np.where(LANE == a, 0, 4 * banks), pair)
            assert same.conflicts == (phase[a] == phase[b]), (a, b)
        assert counted(text, np.where(LANE == a, 0, 2 * banks), pair).conflicts == 0


def test_bytes_are_those_of_active_lanes():
    found = counted("ds_read_b128 v[4:7], v1", LANE * 16, LANE < 10)
    assert (found.accesses, found.bytes) == (1, 160)
    found = counted("ds_write2_b32 v1, v4, v5 offset1:64", LANE * 4)
    assert (found.accesses, found.bytes) == (2, 512)


def test_other_gpus():
    """Their phases are others."""
    w = assembled.waves()
    w.shared.kernel = dataclasses.replace(assembled.KERNEL, arch="gfx942")
    with pytest.raises(ValueError, match="of gfx942 are not known"):
        BankConflicts().begin(w)
