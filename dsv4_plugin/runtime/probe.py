"""A fixed prompt through a loaded model, every operator of the sampled layers against its reference
on the same data.

What it can catch: an implementation that is wrong on this machine, for these weights and these
shapes. What it cannot: wrong weights, which reference and implementation share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import flags
from ..config import Geometry
from ..model import DeepseekV4
from ..model.agreement import Seen, watched
from ..ops import operator as selection
from ..ops.operator import HERE, REFERENCE, Choice, Operator
from .compare import errors, tolerance
from .engine import Engine

DECODED = 3
"""Tokens that are decoded one by one after the prompt."""


class ProbeError(RuntimeError):
    """The loaded model does not compute what its references do."""


@dataclass
class Probe:
    """What a probe found."""

    layers: tuple[int, ...]
    tokens: int
    compared: dict[str, str] = field(default_factory=dict)
    """Implementation by operator, of those that were compared."""
    calls: int = 0
    worst: float = 0.0
    """The largest share of its tolerance that an error took."""
    choices: Seen = field(default_factory=Seen)
    """What ranks chose alike, and what not."""


def sampled_layers(geometry: Geometry) -> tuple[int, ...]:
    """The first layer of each kind (compress ratio, hash-routed or not) and the last."""
    first: dict[tuple[int, bool], int] = {}
    for layer in range(geometry.num_hidden_layers):
        first.setdefault((geometry.compress_ratios[layer], geometry.is_hash_routed(layer)), layer)
    return tuple(sorted({*first.values(), geometry.num_hidden_layers - 1}))


def prompt(geometry: Geometry) -> list[int]:
    """Token ids that fill windows of every kind and give the indexer more entries than it may
    select."""
    length = max(300, 4 * geometry.index_topk + 44)
    return [(17 + 7919 * position) % geometry.vocab_size for position in range(length)]


def probe(model: DeepseekV4) -> Probe:
    """Runs the probe on the backbone of `model`, in caches of its own; every rank of a layout must
    call it.

    Raises ProbeError naming operator, implementation and layer at the first mismatch, and for
    logits that are not finite.
    """
    ids = prompt(model.geometry)
    found = Probe(sampled_layers(model.geometry), len(ids) + DECODED)

    def check(operator: Operator, choice: Choice, *args: Any, **kwargs: Any) -> Any:
        if choice.implementation == REFERENCE or HERE.layer not in (-1, *found.layers):
            return choice.run(*args, **kwargs)
        return _checked(operator, choice, args, kwargs, found)

    with selection.observed(check), watched() as found.choices:
        for logits, length in _run(model, ids):
            if not logits.isfinite().all():
                raise ProbeError(
                    f"the logits of a fixed prompt are not finite after {length} tokens;"
                    " find the layer with DSV4_PROFILE=safe and DSV4_LAYERS_<OPERATOR>, and check"
                    " the checkpoint"
                )
    if found.choices.uneven:
        raise ProbeError(
            f"ranks go on with different choices ({found.choices}); each would add another expert's"
            " slice or attend to other entries. Unset DSV4_CHOICES, so that rank 0 decides"
        )
    return found


def run_once(model: DeepseekV4) -> None:
    """Runs the probe's prompt and decode steps and compares nothing: kernels are compiled. Nothing
    is counted. Raises SelectionError when an implementation that was asked for by name cannot."""
    with selection.observed(lambda _, choice, *args, **kwargs: choice.run(*args, **kwargs)):
        for _ in _run(model, prompt(model.geometry)):
            pass


def _run(model: DeepseekV4, ids: list[int]) -> Iterator[tuple[Tensor, int]]:
    """Logits after the prompt `ids` and after each of some decode steps, with the tokens so far."""
    with _plain_defaults():
        engine = Engine(model, max_tokens=len(ids) + DECODED, max_requests=1)
        sequence = engine.open()
        for tokens in (ids, *[[token] for token in ids[:DECODED]]):
            streams = engine.forward([(sequence, tokens)])
            yield engine.logits(streams[-1:]), sequence.length


def _checked(operator: Operator, choice: Choice, args: tuple, kwargs: dict, found: Probe) -> Any:
    result, wrong = errors(operator, choice.run, args, kwargs)
    first = args[0] if args else next(iter(kwargs.values()))
    allowed = tolerance(operator.name, first.dtype)
    for what, error in wrong.items():
        if error > allowed.limit:
            where = "outside the layers" if HERE.layer < 0 else f"in layer {HERE.layer}"
            raise ProbeError(
                f"{operator.name} is wrong {where} during {HERE.phase}: {choice.implementation}"
                f" differs from the reference by {error:.2e} in its {what}, allowed are"
                f" {allowed.limit:.0e} ({allowed.why}). Start with"
                f" {flags.operator_flag(operator.name)}=reference to serve without it, and run"
                f" `dsv4 verify --op {operator.name}`"
            )
        found.worst = max(found.worst, error / allowed.limit if allowed.limit else 0.0)
    found.compared[operator.name] = choice.implementation
    found.calls += 1
    return result


@contextlib.contextmanager
def _plain_defaults() -> Iterator[None]:
    """torch's own default dtype: a host loads models under that of the weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
