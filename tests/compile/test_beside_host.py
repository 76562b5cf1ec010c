"""The tables in docs/kernels.md are those of the kept data, and the data of host and plugin are of
the same tools."""

from __future__ import annotations

import json

import beside_host
import pytest


def cells(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def test_the_document_holds_the_tables():
    text = beside_host.DOCUMENT.read_text()
    assert beside_host.written(text) == text, "python tests/compile/beside_host.py --write"


def test_every_row_of_the_host_is_shown():
    shown = [
        row
        for row in cells(beside_host.attention()) + cells(beside_host.logits())
        if row[0].startswith("SGLang")
    ]
    assert len(shown) == len(
        json.loads((beside_host.GOLDEN / "host" / "gfx950.json").read_text())["cases"]
    )


def test_ratios_by_hand():
    rows = {
        tuple(row[2:5]): row
        for row in cells(beside_host.attention())
        if row[0] == "**ours**, decode"
    }
    # 512 tokens of 16 heads in one pass: 1152 slots of 584 bytes and 8 of list, 32 KiB of query and
    # output, cos and sin.
    floor = 1152 * 584 + 32768 + 256
    assert rows["16", "512", "1152"][-1] == f"{(1152 * 592 + 32768 + 256) / floor:.2f}"
    # 4 tokens: 16 splits, whose 512 sums and one log-sum-exp a head in fp32 are written and read;
    # cos and sin for each head.
    assert (
        rows["16", "4", "1152"][-1]
        == f"{(1152 * 592 + 32768 + 2 * 16 * 16 * 513 * 4 + 16 * 256) / floor:.2f}"
    )
    host = next(
        row
        for row in cells(beside_host.attention())
        if row[:5] == ["SGLang `paged_prefill`", "bf16 1024 B", "16", "4096", "1152"]
    )
    # bf16 latents of 1024 bytes and 4 of list, against the same floor.
    assert host[-1] == f"{(1152 * 1028 + 32768) / floor:.2f}"


def test_tables_of_other_tools_are_refused(monkeypatch):
    read = beside_host._read

    def older(name: str) -> dict:
        return read(name) | (
            {"versions": {"sglang": "0.5.23", "triton": "3.7.0", "llvm_mca": "22.1.8"}}
            if "host" in name
            else {}
        )

    monkeypatch.setattr(beside_host, "_read", older)
    with pytest.raises(ValueError, match="renew both with the same tools"):
        beside_host.host()


def test_a_document_without_the_place_is_refused():
    with pytest.raises(ValueError, match="no place for the table 'bytes issued'"):
        beside_host.written(beside_host.DOCUMENT.read_text().replace("<!-- bytes issued -->", ""))
