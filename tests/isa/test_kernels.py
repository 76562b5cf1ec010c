"""Every kernel of the package, executed as the machine code that an MI355X would load."""

from __future__ import annotations

import functools

import executions
import pytest
from executions import Case, Execution

from gfx950.hazards import check_waits
from gfx950.machine import Options
from gfx950.races import Alignment, GlobalRaces, LocalRaces, Trace
from gfx950.wait_states import check_wait_states

CASES = executions.all_cases()
LOCKSTEP = Options(watches=(LocalRaces, GlobalRaces, Alignment))
ALONE = Options(seed=1, together=False, late=True)
"""Each wave on its own from barrier to barrier, in random order; loads arrive when waited for."""


@functools.cache
def _execution(case: Case, options: Options) -> Execution | str:
    return executions.execute(case, options)


@pytest.mark.parametrize("options", [LOCKSTEP, ALONE], ids=["lockstep", "alone-late"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case, options: Options):
    """The same tolerance as on a GPU, whatever the order of waves and of loads."""
    found = _execution(case, options)
    if isinstance(found, str):
        pytest.skip(found)
    assert found.launches, "the wrapper launched nothing"
    assert found.passed, f"{found.error:.2e} off, {found.limit:.0e} is allowed"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_has_no_hazards(case: Case):
    """On no path is a register used before its load arrived or too soon after a write; waves meet
    nowhere in LDS or global memory without something that orders them."""
    found = _execution(case, LOCKSTEP)
    if isinstance(found, str):
        pytest.skip(found)
    findings = list(found.findings)
    for each in found.launches:
        ran = each.program
        findings += check_waits(ran) + check_wait_states(ran)
    assert not findings, "\n".join(map(str, dict.fromkeys(findings)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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
def test_every_kernel_is_executed(operator: str, implementation: str):
    """At least one call of it is taken, not refused."""
    mine = [c for c in CASES if (c.operator, c.implementation) == (operator, implementation)]
    assert any(not isinstance(_execution(case, LOCKSTEP), str) for case in mine), (
        f"no call in runtime/cases.py or benchmarks/kernel_cases.py that {implementation} of"
        f" {operator} takes"
    )
