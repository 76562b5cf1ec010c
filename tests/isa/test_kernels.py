"""Every kernel of the package, executed as the machine code that an MI355X would load.

Outside of CI a call whose code objects and sources are those of a run before is not run again:
pytest's cache holds its outcome (`pytest --cache-clear` forgets it).
"""

from __future__ import annotations

import dataclasses
import os

import executions
import pytest
import triton
from executions import WATCHED, Case, Outcome

from gfx950.machine import Options
from gfx950.races import Trace

CASES = executions.all_cases()
ALONE = Options(seed=1, together=False, late=True)
"""Each wave on its own from barrier to barrier, in random order; loads arrive when waited for."""
ORDERS = pytest.mark.parametrize(
    "options",
    [WATCHED, pytest.param(ALONE, marks=pytest.mark.thorough)],
    ids=["lockstep", "alone-late"],
)
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
_known: dict[tuple[Case, Options], Outcome] = {}


@pytest.fixture
def outcome(request):
    """The outcome of a call: from this run, from an earlier one, or of a run now."""

    def find(case: Case, options: Options = WATCHED) -> Outcome:
        if (case, options) in _known:
            return _known[case, options]
        key = None if os.environ.get("CI") else executions.key(case, options)
        kept = key and request.config.cache.get(f"isa/{key}", None)
        found = Outcome(**kept) if kept else executions.outcome(case, options)
        if key and found.error <= found.limit and not found.hazards:
            request.config.cache.set(f"isa/{key}", dataclasses.asdict(found))
        _known[case, options] = found
        return found

    return find


@ORDERS
@EACH
def test_equals_the_reference(case: Case, options: Options, outcome):
    """The same tolerance as on a GPU, whatever the order of waves and of loads."""
    found = outcome(case, options)
    if found.refused:
        pytest.skip(found.refused)
    assert found.launches, "the wrapper launched nothing"
    assert found.error <= found.limit


@EACH
def test_has_no_hazards(case: Case, outcome):
    """On no path is a register used before its load arrived or too soon after a write; waves meet
    nowhere in LDS or global memory without something that orders them."""
    found = outcome(case)
    if found.refused:
        pytest.skip(found.refused)
    assert not found.hazards, "\n".join(found.hazards)


@EACH
def test_uses_no_bits_that_nobody_set(case: Case):
    """Registers, LDS and the ground between buffers start with other bits: every address, stored
    value and branch stays the same."""
    traces = [Trace(), Trace()]
    for seed, trace in enumerate(traces):
        found = executions.execute(case, Options(seed=seed, watches=(lambda t=trace: t,)))
        if isinstance(found, str):
            pytest.skip(found)
    assert traces[0].events
    findings = traces[0].difference(traces[1])
    assert not findings, str(findings[0])


@pytest.mark.parametrize(
    ("operator", "implementation"), [(name, each.name) for name, each in executions.kernels()]
)
def test_every_kernel_is_executed(operator: str, implementation: str, outcome):
    """At least one call of it is taken, not refused."""
    mine = [c for c in CASES if (c.operator, c.implementation) == (operator, implementation)]
    assert any(not outcome(case).refused for case in mine), (
        f"no call in runtime/cases.py or benchmarks/kernel_cases.py that {implementation} of"
        f" {operator} takes"
    )


def test_the_table_is_as_executed(outcome):
    """docs/kernels.md, but for the error, which depends on this CPU's order of sums."""
    if triton.__version__ != "3.8.0":
        pytest.skip(f"the table is of Triton 3.8.0, this is {triton.__version__}")
    error = executions.HEADER.index("error")
    now = executions.table({c: outcome(c) for c in CASES})
    kept = [row for row in executions.documented() if row[1] in executions.LANGUAGES]
    without = [[[*row[:error], *row[error + 1 :]] for row in rows] for rows in (now, kept)]
    assert without[0] == without[1], "renew it: python tests/isa/executions.py"
