"""Arguments that are carried to a device and back give what they give at home; here the device is
the CPU, and carrying is copying."""

from __future__ import annotations

import devices
import pytest
import torch

from dsv4_plugin.ops.operator import OPERATORS
from dsv4_plugin.runtime import compare
from dsv4_plugin.runtime.cases import cases, sizes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "operator", ["compress", "qk_norm_rope_store", "indexer_logits", "build_step_plan"]
)
def test_carrying_changes_nothing(operator, monkeypatch):
    """Kernels that write caches and rings in place, and read plans."""
    monkeypatch.setattr(devices, "CARRIED", True)
    monkeypatch.setattr(devices, "DEVICE", CPU)
    each = OPERATORS[operator]
    carried = devices.on_device(each.reference)
    assert carried is not each.reference
    for case in cases(operator, sizes("pro", CPU, quick=True)[1], CPU, seed=4):
        outcomes = []
        for run in (each.reference, carried):
            arguments = case.arguments()
            result = run(*arguments)
            outcomes.append(compare.outcome(each, result, compare.bound(each, arguments, {})))
        for name, want in outcomes[0].items():
            assert torch.equal(outcomes[1][name].nan_to_num(), want.nan_to_num()), name
