"""The plan of memory against what the launchers allocate: the largest step of a rank of Pro on
eight, on torch's meta device, with every kernel that a gfx950 takes."""

from __future__ import annotations

import launches
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.roofline.layout import Layout
from dsv4_plugin.roofline.memory_plan import memory_plan
from dsv4_plugin.runtime.precompile import Load, step_plan

MI355X_BYTES = 288e9
CHUNK = 8192


class _Peak(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live, and the most of them."""

    def __init__(self):
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """From here on."""
        self.bytes = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {self._key(each) for each in tree_leaves((args, kwargs)) if self._is(each)}
        for each in tree_leaves(result):
            if self._is(each) and self._key(each) not in given | self._living.keys():
                storage = each.untyped_storage()
                self._living[self._key(each)] = StorageWeakRef(storage), storage.nbytes()
        self._living = {
            key: (alive, size) for key, (alive, size) in self._living.items() if not alive.expired()
        }
        self.bytes = max(self.bytes, sum(size for _, size in self._living.values()))
        return result

    @staticmethod
    def _is(value: object) -> bool:
        return isinstance(value, torch.Tensor)

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata


def peak(rows: int, requests: int, context: int) -> int:
    """Bytes that a step allocates at most at the same time, the plan of the step left out."""
    with launches.counting():
        model = launches.small_model()
        plan = step_plan(rows, requests, context, Load())
        allocated = _Peak()
        with allocated:
            launches.advance(model, plan, allocated.begin)
    return allocated.bytes


@pytest.mark.parametrize(
    ("rows", "requests", "context"),
    [(CHUNK, 1, CHUNK), (CHUNK, 16, 9000), (CHUNK, 1, 1 << 20), (256, 256, 32768)],
)
def test_a_step_fits_the_workspace_of_the_plan(rows, requests, context):
    plan = memory_plan(
        load_geometry("pro"),
        Layout(8, 1, 1),
        MI355X_BYTES,
        context=context,
        requests=requests,
        chunk=rows,
    )
    planned = sum(
        size for name, size in plan.workspace.items() if not name.startswith(("logits", "runtime"))
    )
    allocated = peak(rows, requests, context)
    print(
        f"{rows} rows, context {context}: {allocated / 1e9:.2f} GB of {planned / 1e9:.2f} planned"
    )
    assert allocated <= planned
    # A plan that asks for far more would refuse what fits.
    assert planned <= 1.2 * allocated
