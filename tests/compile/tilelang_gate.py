"""TileLang's kernels in the compile gate: lowered to HIP, compiled for a chip by clang 22, measured
as Triton's are. Kept in golden/tilelang.json, apart from tables that need no clang.

    PYTHONPATH=. python tests/compile/tilelang_gate.py      # compiles anew, keeps the table
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import table
from assembly import hot_loop
from chips import CHIPS
from pretend import Launch
from registry import Case, Units

from dsv4_plugin import device

GOLDEN = table.GOLDEN / "tilelang.json"
_WAIT = re.compile(r"s_waitcnt.*vmcnt\((\d+)\)")


def _indexer_logits(tokens: int, requests: int, max_seq_len: int) -> None:
    from cases import indexer_logits as triton_case

    from dsv4_plugin.kernels.tilelang.indexer_logits import indexer_logits

    with mock.patch.object(triton_case, "indexer_logits", indexer_logits):
        triton_case._launch(tokens, requests, max_seq_len)


def _mhc(rows: int, dim: int, before: bool) -> None:
    from cases import mhc as triton_case

    from dsv4_plugin.kernels.tilelang import mhc

    streams = triton_case._bf16(rows, 4, dim)
    if before:
        mhc.mhc_pre(streams, *triton_case._site(dim), 20, 1e-6, 1e-6, True)
        return
    with mock.patch.object(triton_case, "mhc", mhc):
        triton_case._post(rows, dim)


def _sparse_mla(tokens: int, heads: int) -> None:
    from cases import sparse_mla as triton_case

    from dsv4_plugin.kernels.tilelang import sparse_mla

    triton_case._call(sparse_mla, tokens, heads, 1024, 4)


CASES = {
    "indexer_logits": [
        Case(
            "decode-64/128k",
            lambda: _indexer_logits(64, 64, 131072),
            matrix={"indexer_logits_kernel": "f8f6f4"},
            # a pass of the four waves: the pages that are under way together
            units={"indexer_logits_kernel": lambda c: Units("logit", 2 * 64, macs=64 * 128)},
            workgroups={"indexer_logits_kernel": 4},
            archs=("gfx950",),
        ),
        Case(
            "decode-64/128k",
            lambda: _indexer_logits(64, 64, 131072),
            matrix={"indexer_logits_kernel": "8-bit half rate"},
            units={"indexer_logits_kernel": lambda c: Units("logit", 64, macs=64 * 128)},
            archs=("gfx942",),
        ),
    ],
    "mhc_pre": [
        Case(
            "pro/64-tokens",
            lambda: _mhc(64, 7168, before=True),
            matrix={"mhc_project_kernel": "16-bit"},
            archs=("gfx950",),
        )
    ],
    "mhc_post": [
        Case(
            "pro/64-tokens",
            lambda: _mhc(64, 7168, before=False),
            workgroups={"mhc_post_kernel": 8},
            archs=("gfx950",),
        )
    ],
    "sparse_mla": [
        Case(
            f"decode/{heads}-heads/64-tokens",
            lambda heads=heads: _sparse_mla(64, heads),
            matrix={"sparse_mla_attend_kernel": "16-bit"},
            # a pass takes 32 slots for 16 heads, two products of 512 multiply-adds each
            units={"sparse_mla_attend_kernel": lambda c: Units("slot*head", 32 * 16, 2 * 512)},
            workgroups={"sparse_mla_attend_kernel": 3, "sparse_mla_combine_kernel": 8},
            archs=("gfx950",),
        )
        for heads in (16, 64)
    ],
}
"""By operator."""


@contextmanager
def pretend(arch: str) -> Iterator[list[Launch]]:
    """Within it this process believes in a GPU of `arch`; TileLang kernels are compiled for it,
    recorded and not run."""
    from dsv4_plugin.kernels.tilelang import build

    launches: list[Launch] = []

    def compile_only(kernel: build.Kernel, arguments: tuple, constants: dict[str, Any]) -> None:
        start = time.process_time()
        lowered = kernel.lower(arch, **constants)
        compiled = build.compiled(lowered, arch)
        grid = lowered.grid(lowered.bind(arguments))
        spent = time.process_time() - start
        launches.append(Launch(lowered.name, constants, grid, compiled, spent))

    with (
        mock.patch.object(device, "arch", lambda: arch),
        mock.patch.object(build.Kernel, "run", compile_only),
    ):
        yield launches


@cache
def rows() -> dict[str, dict[str, Any]]:
    """The table: rows "operator | case | arch | kernel"; `loop_waits` are the loads that each wait
    of the hot loop leaves under way."""
    found = {}
    for operator, cases in CASES.items():
        for case in cases:
            for arch in case.archs:
                with pretend(arch) as launches:
                    case.launch()
                for launch in launches:
                    row = table.measure(launch, CHIPS[arch], case)
                    body = hot_loop(launch.compiled.asm["amdgcn"]) or []
                    row["loop_waits"] = [int(w[1]) for w in map(_WAIT.search, body) if w]
                    found[f"{operator} | {case.name} | {arch} | {launch.kernel}"] = row
    return found


def versions() -> dict[str, Any]:
    """What the table depends on."""
    import tilelang

    from dsv4_plugin.kernels.tilelang import build

    return {
        "tilelang": tilelang.__version__,
        "clang": build.clang()[1].split("-")[0],
        **{name: table.versions()[name] for name in ("llvm_mca", "columns")},
    }


def kept() -> dict[str, Any]:
    """The table of golden/."""
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"versions": {}, "rows": {}}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    print(*table.moved(kept(), rows()), sep="\n")
    GOLDEN.write_text(json.dumps({"versions": versions(), "rows": rows()}, indent=1) + "\n")
