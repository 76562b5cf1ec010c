"""Launchers refuse tensors whose memory lies otherwise than their kernel reads it, by name; they
copy nothing."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.ops.operator import OPERATORS
from dsv4_plugin.runtime.cases import cases, sizes
from dsv4_plugin.runtime.compare import bound

CPU = torch.device("cpu")
READ = {
    "build_step_plan": ("position", "request", "out_slot", "prefix_lens", "seq_lens", "slot_table"),
    "compress": ("projected", "ring", "ape", "norm_weight", "cos", "sin"),
    "indexer_logits": ("q", "weights"),
    "moe": ("x", "weights", "experts"),
    "qk_norm_rope_store": ("q", "kv", "kv_weight", "cos", "sin", "slots"),
    "rope_hadamard_quant": ("q", "weights", "cos", "sin"),
    "route": ("x", "gate", "token_ids"),
    "shared_expert": ("x",),
    "sparse_mla": ("q", "window", "compressed", "sink", "cos", "sin"),
    "topk_select": ("logits", "visible"),
}


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second place of a memory of twice the size."""
    return torch.stack((tensor, tensor), -1)[..., 0]


@pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator in READ for name in READ[operator]]
)
def test_a_stride_is_refused_by_name(operator, name):
    size = sizes("pro", CPU, quick=True)[1]
    for case in cases(operator, size, CPU, seed=3):
        arguments = bound(OPERATORS[operator], case.arguments(), {})
        if arguments.get(name) is None:
            continue
        arguments[name] = apart(arguments[name])
        launcher = OPERATORS[operator].implementations["triton"].load()
        with pytest.raises(ValueError, match=rf"^{operator}: {name} \[.*has strides"):
            launcher(*arguments.values())
        return
    raise AssertionError(f"no case of {operator} has {name}")
