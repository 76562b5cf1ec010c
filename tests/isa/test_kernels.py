"""Every kernel of the package, executed as the machine code that an MI355X would load."""

from __future__ import annotations

import functools

import executions
import pytest
from executions import Case, Execution

from gfx950.machine import Options

CASES = executions.all_cases()
LOCKSTEP = Options()
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
