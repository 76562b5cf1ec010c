"""What every layer of one step reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..cache import Caches
from ..ops.rope import rotation
from ..ops.step_plan import StepPlan
from .replicas import RowsOfAll


@dataclass(frozen=True)
class Rotation:
    """(cos, sin) fp32 [n, 32] of the step's rows and of the entries they complete, for one kind of
    layer."""

    rows: tuple[Tensor, Tensor]
    entries: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Step:
    """Token ids [T], the index tensors, the caches and the rotations by compress ratio. The id is
    -1 in rows that pad a captured graph: no expert works on them."""

    token_ids: Tensor
    plan: StepPlan
    caches: Caches
    rotations: dict[int, Rotation]
    visible: Tensor | None = None
    """int64 [T]: ratio-4 entries that each row sees; a draft has no layer that asks."""
    rows: RowsOfAll | None = None
    """Of all attention replicas, where there are several."""


def rotations(plan: StepPlan, frequencies: dict[int, Tensor]) -> dict[int, Rotation]:
    """Rotations of a step for each compress ratio in `frequencies` (fp32 [32] each)."""
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    result = {}
    for ratio, frequency in frequencies.items():
        kind = min(ratio, 1)  # ratios 4 and 128 turn alike
        if kind not in shared:
            shared[kind] = rotation(plan.position, frequency)
        entries = rotation(plan.compression[ratio].position, frequency) if ratio else None
        result[ratio] = Rotation(shared[kind], entries)
    return result
