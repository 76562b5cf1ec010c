"""Kernels of others (aiter, the host) and in other languages (TileLang) in the calls of
`dsv4 verify` and in a graph, on a machine that has their packages."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from dsv4_plugin.host import kernels  # noqa: F401  all operators' implementations
from dsv4_plugin.ops.operator import OPERATORS
from dsv4_plugin.runtime.cases import MODELS, cases, sizes
from dsv4_plugin.runtime.compare import bound, errors, outcome, tolerance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda")
OTHERS = [
    (operator, name)
    for operator, each in OPERATORS.items()
    for name in ("aiter", "host", "tilelang")
    if name in each.implementations
]


def poison(result: object) -> None:
    """Fills what a kernel returned with NaN, so that only a replay can have written it."""
    for part in pytree.tree_leaves(result):
        if isinstance(part, torch.Tensor):
            part.view(torch.uint8).fill_(0xFF)


@pytest.mark.parametrize(("operator", "name"), OTHERS)
def test_agrees_with_the_reference_and_replays(operator, name):
    each, implementation = OPERATORS[operator], OPERATORS[operator].implementations[name]
    if reason := implementation.unavailable():
        pytest.skip(reason)
    run, refused, taken = implementation.load(), set(), 0
    every = [
        case
        for model in MODELS
        for size in sizes(model, DEVICE, quick=False)
        for case in cases(operator, size, DEVICE, seed=1)
    ]
    for case in every:
        arguments = case.arguments()
        if implementation.requires and (reason := implementation.requires(*arguments)):
            refused.add(reason)
            continue
        _, found = errors(each, run, arguments, {})
        limit = tolerance(operator, arguments[0].dtype).limit
        assert max(found.values(), default=0.0) <= limit, (case.label, found)
        eager = outcome(each, run(*arguments), bound(each, arguments, {}))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run(*arguments)
        poison(result)
        graph.replay()
        torch.cuda.synchronize()
        for part, value in outcome(each, result, bound(each, arguments, {})).items():
            assert torch.equal(value.nan_to_num(), eager[part].nan_to_num()), (case.label, part)
        taken += 1
    assert taken, refused
