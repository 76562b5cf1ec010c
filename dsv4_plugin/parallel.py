"""Which part of the model this process holds, and how partial results are summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .config import Geometry


class ParallelError(ValueError):
    """A parallel layout that the model's sizes do not allow."""


def _identity(x: Tensor) -> Tensor:
    return x


def _alone(x: Tensor) -> Tensor:
    return x.unsqueeze(0)


@dataclass(frozen=True)
class Group:
    """One process's place in a group; `all_reduce` returns the sum of its argument over the group,
    `broadcast` the argument that rank 0 gave, `all_gather` those of all ranks in their order [size,
    ...]."""

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = _identity
    broadcast: Callable[[Tensor], Tensor] = _identity
    all_gather: Callable[[Tensor], Tensor] = _alone

    def slice(self, total: int) -> slice:
        """This rank's contiguous share of `total` rows."""
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True)
class Parallel:
    """Groups of one process. Every size is 1 unless given.

    `attention` splits heads and output groups, `expert` splits the routed experts by index,
    `expert_tensor` splits each expert's intermediate size, `shared` that of the shared expert,
    `vocab` the rows of embedding and head.
    """

    attention: Group = field(default_factory=Group)
    expert: Group = field(default_factory=Group)
    expert_tensor: Group = field(default_factory=Group)
    shared: Group = field(default_factory=Group)
    vocab: Group = field(default_factory=Group)

    def check(self, geometry: Geometry) -> None:
        """Raises ParallelError naming the size that a group does not divide."""
        block = geometry.weight_block[0]
        for what, total, group, unit in (
            ("num_attention_heads", geometry.num_attention_heads, self.attention, 1),
            ("o_groups", geometry.o_groups, self.attention, 1),
            (
                "o_groups x o_lora_rank",
                geometry.o_groups * geometry.o_lora_rank,
                self.attention,
                block,
            ),
            ("n_routed_experts", geometry.n_routed_experts, self.expert, 1),
            ("moe_intermediate_size", geometry.moe_intermediate_size, self.expert_tensor, block),
            ("moe_intermediate_size", geometry.moe_intermediate_size, self.shared, block),
            ("vocab_size", geometry.vocab_size, self.vocab, 1),
        ):
            if group.size > 1 and total % (group.size * unit):
                blocks = f" in whole blocks of {unit}" if unit > 1 else ""
                raise ParallelError(
                    f"parallel size {group.size} does not divide {what} {total}{blocks}"
                )
