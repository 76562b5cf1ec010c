"""What one layer's experts launch, and that none of it lets the CPU wait for the device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_golden_experts import KERNELS, TRITON
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from dsv4_plugin.accuracy.gate import REFERENCES, selected
from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.config import Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.model.linear import Activation
from dsv4_plugin.ops import operator

aten = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
_NO_LAUNCH = ("empty", "view", "detach", "alias", "unsqueeze", "slice", "select", "expand")


class Watch(TorchDispatchMode):
    """Refuses what would copy a number of the device to the CPU; keeps what would be launched."""

    def __init__(self, inside):
        super().__init__()
        self.launched, self._inside = [], inside

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function is aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if function in _WAITS or masks:
            raise AssertionError(f"{function} waits for the device")
        name = function.overloadpacket.__name__
        if not self._inside and not any(word in name for word in _NO_LAUNCH):
            self.launched.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def layers(golden_dir, golden_geometry, monkeypatch):
    monkeypatch.setenv("DSV4_WEIGHTS", "packed")
    model = DeepseekV4(golden_geometry, Precision.SERVING, parts="backbone")
    load_checkpoint(model, golden_dir)
    return [model.layers[layer].ffn for layer in (0, 4)]


@pytest.fixture
def watch(monkeypatch):
    """Launches of Triton kernels by name; torch's own inside the interpreter are not counted."""
    inside, run = [], InterpretedFunction.run
    found = Watch(inside)

    def launch(self, *args, **kwargs):
        found.launched.append(self.fn.__name__)
        inside.append(self)
        # the interpreter reads scalars on the CPU, where it runs
        with torch.utils._python_dispatch._disable_current_modes():
            result = run(self, *args, **kwargs)
        inside.pop()
        return result

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    return found


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("layer", [0, 1], ids=["hash", "learned"])
def test_a_layer_of_experts(layers, watch, rows, layer):
    x, step = (
        torch.randn(rows, 128).bfloat16(),
        SimpleNamespace(token_ids=torch.arange(rows), rows=None),
    )
    with selected(TRITON), watch:
        layers[layer](Activation(x), step)
        assert {
            name: {choice.implementation for choice in operator.OPERATORS[name].choices.values()}
            for name in KERNELS
        } == {name: {"triton"} for name in KERNELS}
    products = ["quantise_rows_kernel", "gate_up_kernel", "down_kernel"]
    assert watch.launched == [
        "router_logits_kernel",
        "choose_kernel",
        "group_kernel",
        *products,
        "sum_kernel",
        *products,
        "add",
        "_to_copy",
    ]


def test_the_watch_sees_a_wait(layers, watch):
    """Of the reference of a prefill, which looks at the experts that were chosen."""
    operator.enter_step(max_queries=3)
    x, step = torch.randn(3, 128).bfloat16(), SimpleNamespace(token_ids=torch.arange(3), rows=None)
    with selected(REFERENCES), watch, pytest.raises(AssertionError, match="waits for the device"):
        layers[1](Activation(x), step)
