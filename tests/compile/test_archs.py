"""Where an implementation says that it compiles, it does; where it says not, it does not."""

from __future__ import annotations

import pytest
from chips import Chip
from pretend import pretend
from registry import operators
from triton.backends.compiler import GPUTarget

from dsv4_plugin.ops.compile_failure import compile_failure
from dsv4_plugin.ops.operator import OPERATORS

AMPERE = Chip("sm_80", GPUTarget("cuda", 80, 32), 108, 163 << 10, 1024)


KERNELS = [
    name
    for name in operators()
    if name in OPERATORS and "triton" in OPERATORS[name].implementations
]


@pytest.mark.parametrize("operator", KERNELS)
def test_ampere(operator: str):
    """The GPUs before sm_89, which have no FP8 e4m3. The compiler's error is told as one."""
    case = next(case for case in operators()[operator] if not case.name.startswith("gluon/"))
    with pretend(AMPERE) as launches:
        reason = OPERATORS[operator].implementations["triton"].unavailable()
        if reason is None:
            case.launch()
            assert launches
            return
        with pytest.raises(Exception) as failure:
            case.launch()
    assert "FP8" in reason
    assert "fp8e4nv not supported" in compile_failure(failure.value)
