"""A call's result against the plain torch reference, on some of its rows, before anybody times
it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import SAMPLE, Call
from kernel_peers import Peer
from torch import Tensor

from dsv4_plugin.runtime import compare


@dataclass(frozen=True)
class Check:
    """How far a result was from the reference, at most how far it may be, and why that much."""

    error: float
    limit: float
    why: str
    rows: int
    """Rows that were compared."""
    note: str = ""
    """What was wrong."""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


def sample(rows: int, device: torch.device) -> Tensor:
    """int64: the first and the last of `rows`, and some between."""
    return (
        torch.linspace(0, rows - 1, min(rows, SAMPLE), device=device, dtype=torch.float64)
        .round()
        .long()
        .unique()
    )


def check(call: Call, run: Callable[..., Any]) -> tuple[Check, Any]:
    """(`run` against the reference on the rows of `sample`, the reference's result on them)."""
    rows = sample(call.rows, _device(call))
    allowed = compare.tolerance(call.operator.name, call.arguments[0].dtype)
    arguments = call.part(rows) if call.part else call.arguments
    named = compare.bound(call.operator, arguments, {})
    states = compare.mutable(call.operator, compare.bound(call.operator, call.arguments, {}))
    before = [state.clone() for state in states]
    # the next result lies in the same memory, which must not hold this one
    _poison(run(*call.arguments), call)
    _restore(states, before)
    for memory in call.poison:
        memory.fill_(0xFF)
    result = run(*call.arguments)
    got = compare.outcome(call.operator, _at(result, rows) if call.part else result, named)
    _restore(states, before)
    wanted = call.operator.reference(*arguments)
    want = compare.outcome(call.operator, wanted, named)
    errors = {name: compare.error(got[name], want[name]) for name in want}
    wrong = ", ".join(name for name, error in errors.items() if error > allowed.limit)
    return (
        Check(
            max(errors.values(), default=0.0),
            allowed.limit,
            allowed.why,
            len(rows) if call.part else call.rows,
            wrong,
        ),
        wanted,
    )


def check_peer(call: Call, peer: Peer, wanted: Any) -> Check:
    """The same for a peer, whose result may say less."""
    rows = sample(call.rows, _device(call))
    allowed = compare.tolerance(call.operator.name, call.arguments[0].dtype)
    if allowed.limit == 0:
        allowed = compare.FP32  # values stand for the numbers that had to be equal
    error = compare.error(peer.rows(peer.run(), rows), peer.want(wanted, rows))
    return Check(error, allowed.limit, allowed.why, len(rows))


def _device(call: Call) -> torch.device:
    return call.arguments[0].device


def _restore(states: list[Tensor], before: list[Tensor]) -> None:
    for state, saved in zip(states, before):
        state.copy_(saved)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif dataclasses.is_dataclass(value):
        yield from _tensors([getattr(value, each.name) for each in dataclasses.fields(value)])


def _poison(result: Any, call: Call) -> None:
    """Overwrites what a call returned, but not what it passed through from its arguments."""
    given = {tensor.data_ptr() for tensor in _tensors(call.arguments)}
    for tensor in _tensors(result):
        if tensor.data_ptr() not in given:
            tensor.view(torch.uint8).fill_(0xFF)


def _at(result: Any, rows: Tensor) -> Any:
    if isinstance(result, tuple):
        return tuple(_at(each, rows) for each in result)
    if result.dtype == torch.float8_e4m3fn:  # which torch does not index everywhere
        return result.view(torch.uint8)[rows].view(result.dtype)
    return result[rows]
