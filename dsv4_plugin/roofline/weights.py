"""How many parameters and released bytes each component of a model has, summed from the table of
released tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from ..checkpoint.schema import TensorSpec, expected_tensors
from ..config import Geometry

_COMPONENTS = (
    (r"embed\.", "embedding"),
    (r"head\.", "head"),
    (r".*\bhc_", "mhc"),
    (r".*ffn\.experts\.", "routed_experts"),
    (r".*ffn\.shared_experts\.", "shared_expert"),
    (r".*ffn\.gate\.tid2eid", "tid2eid"),
    (r".*ffn\.gate\.", "gate"),
    (r".*attn\.indexer\.compressor\.", "indexer_compressor"),
    (r".*attn\.indexer\.", "indexer"),
    (r".*attn\.compressor\.", "compressor"),
    (r".*attn\.(wq_a|wkv)\.", "wq_a_wkv"),
    (r".*attn\.wq_b\.", "wq_b"),
    (r".*attn\.wo_a\.", "wo_a"),
    (r".*attn\.wo_b\.", "wo_b"),
    (r"mtp\.\d+\.([eh]_proj|main_proj)\.", "mtp_projections"),
    (r"mtp\.\d+\.markov_head\.", "markov_head"),
    (r"mtp\.\d+\.confidence_head\.", "confidence_head"),
    (r".*(norm\.weight|attn_sink)$", "norms_and_sinks"),
)


@dataclass(frozen=True)
class Holding:
    """What one component holds: parameters (scales not counted), released bytes and tensors (scales
    counted).

    `group` is the group of ranks that splits it (`parallel.Parallel`), empty when every rank holds
    all of it.
    """

    component: str
    group: str
    mtp: bool
    elements: int
    bytes: int
    tensors: int
    kept: int
    """Bytes of fp32 parameters and integer tables, which stay as they are in any form."""
    kept_elements: int

    def decoded(self, itemsize: int) -> int:
        """Bytes when matrices and norms are decoded to elements of `itemsize` bytes."""
        return self.kept + (self.elements - self.kept_elements) * itemsize


@lru_cache(maxsize=8)
def holdings(geometry: Geometry) -> tuple[Holding, ...]:
    """All components of the released checkpoint of this geometry (docs/model.md §2)."""
    sums: dict[tuple[str, str, bool], list[int]] = {}
    for spec in expected_tensors(geometry).values():
        key = (_component(spec.name), _group(spec), spec.name.startswith("mtp."))
        entry = sums.setdefault(key, [0, 0, 0, 0, 0])
        elements = _parameters(spec)
        kept = spec.dtype in ("F32", "I64") and spec.weight is None
        added = (elements, spec.nbytes, 1, spec.nbytes * kept, elements * kept)
        for at, amount in enumerate(added):
            entry[at] += amount
    return tuple(Holding(*key, *entry) for key, entry in sums.items())


def component_bytes(geometry: Geometry) -> dict[str, int]:
    """Component -> released bytes of the backbone, MTP blocks left out."""
    found: dict[str, int] = {}
    for holding in holdings(geometry):
        if not holding.mtp:
            found[holding.component] = found.get(holding.component, 0) + holding.bytes
    return found


def resident_bytes(geometry: Geometry, shares: dict[str, int], mtp: bool) -> float:
    """Bytes of weights on one GPU when group `g` is split over `shares[g]` ranks (1 where it is not
    named)."""
    return sum(
        holding.bytes / shares.get(holding.group, 1)
        for holding in holdings(geometry)
        if mtp or not holding.mtp
    )


def _component(name: str) -> str:
    return next(component for pattern, component in _COMPONENTS if re.match(pattern, name))


def _group(spec: TensorSpec) -> str:
    if spec.expert is not None:
        return "expert"
    if spec.shard is not None:
        return spec.shard.group
    return ""


def _parameters(spec: TensorSpec) -> int:
    if spec.weight is not None:
        return 0
    return math.prod(spec.shape) * (2 if spec.dtype == "I8" else 1)
