"""TileLang's kernels for gfx942, executed; those for gfx950 are among test_kernels.py's."""

from __future__ import annotations

import executions
import pytest
import tilelang_launches
import torch

from dsv4_plugin.ops import indexer_logits
from dsv4_plugin.runtime import compare
from gfx950.machine import Options
from gfx950.races import Alignment, GlobalRaces, LocalRaces

if reason := tilelang_launches.missing():
    pytest.skip(reason, allow_module_level=True)

WATCHED = Options(watches=(LocalRaces, GlobalRaces, Alignment))
CASES = [
    case
    for case in executions.all_cases()
    if case.implementation == "tilelang" and case.operator == "indexer_logits"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_bytes_of_minus_zero_on_gfx942(case):
    """gfx942 multiplies FNUZ numbers: half the value for the same byte, and NaN for that of -0,
    of which every seventh byte of the keys and every fifth of the queries is one."""
    q, weights, cache, plan = case.arguments()
    q[:, :, ::5] = -0.0
    cache.pages[:, 0:8192:7] = 0x80
    with executions.chip("gfx942", WATCHED) as launches:
        run = indexer_logits.implementations["tilelang"].load()
        _, errors = compare.errors(indexer_logits, run, (q, weights, cache, plan), {})
    assert launches and torch.isfinite(weights).all()
    assert max(errors.values()) <= compare.tolerance("indexer_logits", q.dtype).limit
    assert not [str(found) for each in launches for found in each.told.findings]
