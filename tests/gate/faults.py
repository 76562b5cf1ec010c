"""Mistakes that implementations of DeepSeek-V4 make, each a context in which the references make it
too.

A model must be loaded inside the context: one of the mistakes is made while weights are decoded.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module

import torch

from dsv4_plugin import formats
from dsv4_plugin.cache.layout import entry_slots
from dsv4_plugin.ops import operator as selection
from dsv4_plugin.ops.operator import HERE

QUERIES = import_module("dsv4_plugin.ops.rope_hadamard_quant")


@contextlib.contextmanager
def _replaced(module, name: str, value) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def changed(
    operators: tuple[str, ...], ratio: int | None = None, **changes: Callable
) -> contextlib.AbstractContextManager:
    """Calls of `operators`, in layers of `ratio` or in all, get arguments changed by functions."""

    def mistaken(operator, choice, *args, **kwargs):
        bound = inspect.signature(operator.reference).bind(*args, **kwargs)
        if operator.name in operators and ratio in (None, HERE.ratio):
            for name, change in changes.items():
                bound.arguments[name] = change(bound.arguments[name])
        return operator.reference(*bound.args, **bound.kwargs)

    return selection.observed(mistaken)


def hadamard_dropped_from_queries():
    """Index keys are rotated, queries are not: their products mean nothing."""
    return _replaced(QUERIES, "hadamard", lambda x: x.float())


def hadamard_dropped_from_keys():
    return changed(("compress",), rotate=lambda rotate: False)


def sink_skipped():
    return changed(("sparse_mla",), sink=lambda sink: torch.full_like(sink, float("-inf")))


def next_entry_attended():
    """Entry j + 1 in place of j; the last visible one in place of what nobody wrote yet."""

    def mistaken(operator, choice, *args, **kwargs):
        if operator.name != "topk_select":
            return operator.reference(*args, **kwargs)
        a = inspect.signature(operator.reference).bind(*args, **kwargs).arguments
        entries = operator.reference(a["logits"], a["visible"], a["topk"])
        moved = torch.minimum(entries + 1, a["visible"].unsqueeze(-1) - 1).clamp_min(0)
        slots = entry_slots(a["plan"].page_table[a["plan"].request], moved, 4)
        return slots.masked_fill(entries < 0, -1)

    return selection.observed(mistaken)


def nibbles_swapped():
    """The odd column of packed FP4 weights in the low half of a byte."""
    unpack = formats.unpack_fp4
    return _replaced(
        formats,
        "unpack_fp4",
        lambda packed: unpack(packed).unflatten(-1, (-1, 2)).flip(-1).flatten(-2),
    )


def clamp_forgotten():
    return changed(("moe", "shared_expert"), swiglu_limit=lambda limit: float("inf"))


def sinks_of_the_first_rank():
    """Two ranks share the heads, and both take the first rank's sinks."""
    return changed(("sparse_mla",), sink=lambda sink: sink[: sink.shape[0] // 2].repeat(2))


def ratio_4_branch_off():
    """Layers of ratio 4 attend to their window alone."""
    return changed(
        ("sparse_mla",), ratio=4, compressed=lambda compressed: torch.full_like(compressed, -1)
    )


FAULTS = (
    hadamard_dropped_from_queries,
    hadamard_dropped_from_keys,
    sink_skipped,
    next_entry_attended,
    nibbles_swapped,
    clamp_forgotten,
    sinks_of_the_first_rank,
    ratio_4_branch_off,
)
