"""Lower bounds of the two steps of speculation with a DSpark draft (docs/model.md §3.8, §3.9):
verification, which reads the anchor and the drafts of every request at once, and the draft itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import DSpark, Geometry
from .hardware import Hardware
from .layout import Layout, LayoutError
from .step import Component, Efficiency, Step, decode_step, step_of

MARKOV_LAUNCHES = 2
"""Dependent kernels of one drafted token: its logits with the largest of each part, and the largest
of all."""


@dataclass(frozen=True)
class Speculation:
    """One round for a batch: a draft, a verification, and the tokens that come of them."""

    draft: Step
    verify: Step
    accepted_length: float
    """Tokens that a verification gives on average, the one after the drafts included."""

    @property
    def seconds(self) -> float:
        """Of one token of each request."""
        return (self.draft.seconds + self.verify.seconds) / self.accepted_length

    def under(self, efficiency: Efficiency) -> Speculation:
        return replace(
            self, draft=self.draft.under(efficiency), verify=self.verify.under(efficiency)
        )


def speculation(
    geometry: Geometry,
    hardware: Hardware,
    layout: Layout,
    batch: int,
    context: int,
    accepted_length: float,
    index_dtype: str = "fp8",
) -> Speculation:
    """A round for `batch` requests that hold `context` tokens. Raises LayoutError for a model
    without a DSpark draft, and for an accepted length that no block of its gives."""
    dspark = geometry.dspark
    if dspark is None:
        raise LayoutError("the model has no DSpark draft; flash-0731 and pro-0813 have one")
    if not 1 <= accepted_length <= dspark.block_size + 1:
        raise LayoutError(
            f"an accepted length of {accepted_length:g} cannot be: a block of"
            f" {dspark.block_size} gives 1 to {dspark.block_size + 1} tokens"
        )
    rows = dspark.block_size + 1
    verify = decode_step(geometry, hardware, layout, batch, context, index_dtype, rows)
    draft = _draft_step(geometry, dspark, hardware, layout, batch, context)
    return Speculation(draft, verify, accepted_length)


def _draft_step(
    geometry: Geometry,
    dspark: DSpark,
    hardware: Hardware,
    layout: Layout,
    batch: int,
    context: int,
) -> Step:
    """The stages are layers of ratio 0 with the model's own head; beside them the projection of
    what the backbone left, and the head from token to token, which is read for each drafted
    token."""
    stages = replace(
        geometry,
        num_hidden_layers=dspark.stages,
        compress_ratios=(0,) * dspark.stages,
        num_hash_layers=0,
        num_nextn_predict_layers=0,
        dspark=None,
    )
    block = dspark.block_size
    seen = min(geometry.sliding_window, context) + block
    step = step_of(
        replace(stages, sliding_window=seen),
        hardware,
        layout,
        tokens=batch * block,
        context=seen,
        sampled=batch * block,
        requests=batch,
    )
    d, rank, vocab = geometry.hidden_size, dspark.markov_rank, geometry.vocab_size
    taps = len(dspark.target_layer_ids) * d * d
    rows = max(batch / layout.dp, 1.0) * (block + 1)
    added = (
        Component("main_proj", "weights", taps + taps / 128**2, {"fp8": 2 * taps * rows}),
        Component(
            "markov_head",
            "weights",
            block * 2 * vocab * rank / layout.gpus,
            {"bf16": 2 * vocab * rank * batch * block / layout.gpus},
        ),
        Component("markov_kernels", "launches", launches=MARKOV_LAUNCHES * block),
    )
    return replace(step, context=context, components=(*step.components, *added))
