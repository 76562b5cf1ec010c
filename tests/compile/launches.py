"""Launches of one decode layer of Pro on eight ranks, counted on a GPU that is not there.

The model's own code runs on torch's meta device with the implementations that `auto` takes on a
gfx950; every kernel launch, and every torch operation that is more than a view or an allocation,
counts as one. All-reduces are not in it.

    PYTHONPATH=. python tests/compile/launches.py     # prints the table of docs/performance.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from dsv4_plugin import device
from dsv4_plugin.cache.step_plan import RING_ROWS, Compression, StepPlan, static_windows
from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.config import Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.model.agreement import Agreement
from dsv4_plugin.model.feed_forward import FeedForward
from dsv4_plugin.model.step import Step, rotations
from dsv4_plugin.ops import operator as selection
from dsv4_plugin.parallel import Group, Parallel
from dsv4_plugin.runtime.precompile import Load, caches

RATIOS = (128, 4, 128)
"""Compress ratios of the counted model's layers: between two layers hyper-connections are fused."""
COUNTED = (1, 2)
POOL = Load(requests=64, context=4096)
"""Whose caches stay below 2 GiB: past it a kernel addresses them otherwise."""
SUMS = "sums of experts"
"""Of a row: torch operations between the operators of experts."""
AGREEMENT = "agreement of ranks"
"""Of a row: what packs and unpacks the message by which ranks choose alike."""
APART = ("route", "moe", "shared_expert", SUMS, AGREEMENT)
"""Experts, and what only several ranks need."""
MI355X = SimpleNamespace(multi_processor_count=256, total_memory=288 << 30)
TORCH = "torch"
"""Of a row: operations outside of operators, each by its name."""


class _Count(TorchDispatchMode):
    """Counts what torch would launch."""

    def __init__(self, add):
        super().__init__()
        self._add = add

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name and name not in ("detach", "_reshape_alias"):
            self._add(name)
        return result


@contextmanager
def counting() -> Iterator[Counter]:
    """Within it nothing is compiled or run; yields launches by (layer, operator)."""
    found: Counter = Counter()
    inside: list[str] = []

    def add(name: str) -> None:
        found[selection.HERE.layer, inside[-1] if inside else f"{TORCH} {name}"] += 1

    def launch(kernel, *args, **kwargs):
        add(kernel.__name__)

    def named(name: str, run):
        def call(*args, **kwargs):
            inside.append(name)
            try:
                return run(*args, **kwargs)
            finally:
                inside.pop()

        return call

    def observed(operator, choice, *args, **kwargs):
        implementation = operator.implementations.get(choice.implementation)
        run = implementation.load() if implementation else operator.reference
        return named(operator.name, run)(*args, **kwargs)

    with (
        mock.patch.object(device, "arch", lambda: "gfx950"),
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)),
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(FeedForward, "forward", named(SUMS, FeedForward.forward)),
        mock.patch.object(Agreement, "__call__", named(AGREEMENT, Agreement.__call__)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda where: MI355X),
    ):
        selection.configure()
        try:
            with selection.observed(observed), _Count(add):
                yield found
        finally:
            selection.forget()


def _numbers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device="meta")


def _plan(requests: int, context: int) -> StepPlan:
    def compression(ratio: int) -> Compression:
        windows, items = static_windows(requests, requests, ratio), 8 if ratio == 4 else ratio
        return Compression(
            ratio=ratio,
            halves=items // ratio,
            token=_numbers(windows),
            position=_numbers(windows),
            slots=_numbers(windows),
            step_row=_numbers(windows, items),
            ring_row=_numbers(windows, items),
            ring_write_row=_numbers(requests),
        )

    return StepPlan(
        position=_numbers(requests),
        request=_numbers(requests),
        query=_numbers(requests),
        max_queries=1,
        max_seq_len=context,
        window_write=_numbers(requests),
        window=_numbers(requests, 128),
        page_table=_numbers(requests, -(-context // 256)),
        compression={ratio: compression(ratio) for ratio in RING_ROWS},
    )


def small_model() -> DeepseekV4:
    """A rank of Pro on eight, with a layer for each of RATIOS, on the meta device."""
    full = load_geometry("pro")
    small = replace(
        full,
        num_hidden_layers=len(RATIOS),
        num_nextn_predict_layers=0,
        num_hash_layers=0,
        compress_ratios=RATIOS,
    )
    eight = Group(0, 8)
    parallel = Parallel(attention=eight, expert_tensor=eight, shared=eight, vocab=eight)
    return DeepseekV4(small, Precision.SERVING, parallel, "meta", parts="backbone")


def advance(model: DeepseekV4, plan: StepPlan, begin: Callable[[], None] = lambda: None) -> None:
    """A step of `plan` through the layers of `model`; `begin` is called before the first."""
    tokens, geometry = plan.position.shape[0], model.geometry
    frequencies = {ratio: getattr(model, f"frequencies_{ratio}") for ratio in set(RATIOS)}
    step = Step(
        _numbers(tokens),
        plan,
        caches(geometry, POOL),
        rotations(plan, frequencies),
        plan.visible(4),
    )
    begin()
    states = [torch.empty(tokens, 4, geometry.hidden_size, dtype=torch.bfloat16, device="meta")]
    for layer in model.layers:
        states.append(layer.advance(states.pop(), step))


def table(requests: int = 8, context: int = 32768) -> dict[int, Counter]:
    """Launches by operator of one decode layer, by its compress ratio."""
    with counting() as found:
        model = small_model()
        plan = _plan(requests, context)
        plan.dense_slots  # noqa: B018 - once a step, read by all layers
        advance(model, plan, found.clear)
    return {
        RATIOS[layer]: Counter(
            {name: count for (where, name), count in found.items() if where == layer}
        )
        for layer in COUNTED
    }


def totals(counts: Counter) -> tuple[int, int]:
    """(launches without what is apart, all launches)."""
    return counts.total() - sum(counts[name] for name in APART), counts.total()


def markdown(tables: dict[int, Counter]) -> str:
    """The table as docs/performance.md holds it."""
    names = sorted(set().union(*tables.values()), key=lambda name: (name in APART, name))
    rows = [(name, tables[4][name] or "–", tables[128][name] or "–") for name in names]
    four, other = totals(tables[4]), totals(tables[128])
    at = next(place for place, name in enumerate(names) if name in APART)
    rows.insert(at, ("**without experts**", f"**{four[0]}**", f"**{other[0]}**"))
    rows.append(("all", four[1], other[1]))
    lines = [f"| {name} | {first} | {second} |" for name, first, second in rows]
    return "\n".join(["| operator | c4 | c128 |", "|---|---|---|", *lines])


if __name__ == "__main__":
    print(markdown(table()))
