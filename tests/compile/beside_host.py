"""Our attention kernels beside SGLang's own, by what both compile to on gfx950: rows for
docs/kernels.md.

    python tests/compile/beside_host.py            # prints the tables
    python tests/compile/beside_host.py --write    # puts them into docs/kernels.md

Ours are golden/sparse_mla.json and golden/indexer_logits.json, the host's golden/host/gfx950.json:
kept tables, so nothing is compiled here. Bytes are formulas of the shapes (benchmarks/floors.py).
llvm-mca models a wave; nothing here is a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks"), str(ROOT)]

import floors  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = ROOT / "docs" / "kernels.md"
WINDOW = 128
_COLUMNS = (
    "kernel",
    "cache",
    "heads",
    "tokens",
    "slots",
    "warps",
    "VGPR",
    "LDS",
    "workgroups a CU",
    "issue cycles",
    "product repeated",
    "bytes / floor",
)
_HOST_CACHES = {"bf16": "bf16 1024 B", "fp8+scales": "FP8 544 B"}


def _read(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text())


def host() -> dict[str, Any]:
    """The host's kept table. Raises ValueError when it is of another compiler or model than
    ours."""
    table = _read("host/gfx950.json")
    for ours in ("sparse_mla.json", "indexer_logits.json"):
        kept = _read(ours)["versions"]
        if any(table["versions"][name] != kept.get(name) for name in ("triton", "llvm_mca")):
            raise ValueError(
                f"golden/host/gfx950.json is of {table['versions']}, golden/{ours} of {kept}; renew"
                " both with the same tools"
            )
    return table


def _shapes() -> list[tuple]:
    spec = importlib.util.spec_from_file_location(
        "compile_cases_sparse_mla", Path(__file__).parent / "cases" / "sparse_mla.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SHAPES


def _ratio(issued: float, tokens: int, heads: int, slots: int) -> float:
    return issued / floors.sparse_mla(tokens, heads, tokens * slots, tokens * slots).bytes


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        str(row["num_warps"]),
        str(row["vgpr"]),
        f"{row['lds']:,}",
        str(row["wg_per_cu"]),
        f"{row['simd_issue_cycles_per_unit']:.2f}",
        f"{row['mac_redundancy']:.1f}",
    ]


def our_attention() -> Iterator[tuple[tuple, list[str]]]:
    """((heads, phase, tokens), cells) of each row of ours."""
    rows = _read("sparse_mla.json")["rows"]
    for name, tokens, heads, entries, *_ in _shapes():
        row, slots = rows[f"gluon/{name} | gfx950 | _attend"], WINDOW + entries
        issued = floors.sparse_mla_issued(
            tokens, heads, slots, row["config"]["BLOCK_H"], row["grid"][2]
        )
        yield (
            (heads, name.split("/")[0], tokens),
            [
                "**ours**, " + name.split("/")[0],
                "packed 584 B",
                str(heads),
                str(tokens),
                str(slots),
                *_cells(row),
                f"{_ratio(issued, tokens, heads, slots):.2f}",
            ],
        )


def host_attention() -> Iterator[tuple[tuple, list[str]]]:
    """The same of the host's rows; its bytes a token are in the kept table."""
    for case in host()["cases"]:
        row, bytes_ = case["kernels"][0], case["bytes"]
        if row["unit"] != "slot*head":
            continue
        family, share, *rest = case["case"].split("/")
        tokens = next(int(part[1:]) for part in rest if part[0] == "T" and part[1:].isdigit())
        heads = {"tp8": 16, "dp": 128}[share]
        cache = next(
            (_HOST_CACHES[part] for part in rest if part in _HOST_CACHES),
            "bf16 1024 B" if "prefill" in family else "packed 584 B",
        )
        ratio = _ratio(bytes_["moved"] * tokens, tokens, heads, bytes_["slots"])
        yield (
            (heads, "prefill" if "prefill" in family else "decode", tokens),
            [
                f"SGLang `{family}`",
                cache,
                str(heads),
                str(tokens),
                str(bytes_["slots"]),
                *_cells(row),
                f"{ratio:.2f}",
            ],
        )


def attention() -> str:
    """Decode and prefill, by heads, phase and tokens."""
    rows = [*our_attention(), *host_attention()]
    return _table(
        _COLUMNS,
        [cells for _, cells in sorted(rows, key=lambda row: (row[0], "ours" not in row[1][0]))],
    )


def logits() -> str:
    """The indexer's logits: one logit is 64 heads of 128 multiply-adds."""
    cells = []
    for name, row in _read("indexer_logits.json")["rows"].items():
        case, arch, _ = name.split(" | ")
        if arch == "gfx950":
            cells.append(["**ours**, " + case, "FP8 132 B", *_cells(row)])
    for case in host()["cases"]:
        row = case["kernels"][0]
        if row["unit"].startswith("slot (") and "logits" in row["kernel"]:
            cells.append([f"SGLang `{case['case']}` ({case['model']})", "FP4", *_cells(row)])
    return _table(
        ("kernel", "keys", *_COLUMNS[5:9], "issue cycles a logit", "product repeated"), cells
    )


_TOPK_SHAPES = (
    (8192, 1024),
    (16384, 1024),
    (17408, 1024),
    (32768, 1024),
    (262144, 1024),
    (32768, 512),
    (262144, 512),
)
_COMPRESS_SHAPES = [
    (kind, phase, *rest)
    for kind, ratio, dim in (("c4", 4, 512), ("c4 index", 4, 128), ("c128", 128, 512))
    for phase, *rest in (
        ("decode, 1 completes", ratio, dim, 1, 1, 1),
        ("decode, 64 complete", ratio, dim, 64, 64, 64),
        ("prefill 8192", ratio, dim, 8192 // ratio, {4: 128, 128: 0}[ratio], 8192),
    )
]


def issued() -> str:
    """Bytes that topk_select and compress issue by construction over their floors."""
    from dsv4_plugin.kernels.triton.compress import _STRIPE
    from dsv4_plugin.kernels.triton.topk_select import _CHUNK

    cells = []
    for visible, topk in _TOPK_SHAPES:
        floor, moved = (
            floors.topk_select(1, visible, topk).bytes,
            floors.topk_select_issued(visible, topk, _CHUNK),
        )
        cells.append(
            [
                "topk_select",
                f"a row of {visible:,} entries, top {topk}",
                f"{floor:,}",
                f"{moved:,}",
                f"{moved / floor:.2f}",
            ]
        )
    for kind, phase, ratio, dim, windows, kept, tokens in _COMPRESS_SHAPES:
        floor = floors.compress(windows, kept, ratio, dim).bytes
        moved = floors.compress_issued(
            windows, kept, tokens, ratio, dim, _STRIPE if ratio == 128 else dim
        )
        cells.append(
            ["compress", f"{kind}, {phase}", f"{floor:,}", f"{moved:,}", f"{moved / floor:.2f}"]
        )
    return _table(("operator", "call", "floor, bytes", "issued, bytes", "issued / floor"), cells)


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join(
        [
            "| " + " | ".join(columns) + " |",
            "|---" * len(columns) + "|",
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    )


TABLES = {
    "beside the host: attention": attention,
    "beside the host: logits": logits,
    "bytes issued": issued,
}
"""Tables by their name in the document."""


def written(text: str) -> str:
    """The document with its tables as they are now. Raises ValueError when it lacks the place of
    one."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(
                f"{DOCUMENT} has no place for the table {name!r}: {begin.strip()} … {end.strip()}"
            )
        text = before + begin + table() + end + after
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/kernels.md")
    if parser.parse_args().write:
        DOCUMENT.write_text(written(DOCUMENT.read_text()))
    else:
        print(*(f"{name}\n{table()}" for name, table in TABLES.items()), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
