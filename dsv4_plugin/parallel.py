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
    ...], and `reduce_scatter` this rank's share of the rows of the sum, whose number the size
    divides."""

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[Tensor], Tensor] = _identity
    broadcast: Callable[[Tensor], Tensor] = _identity
    all_gather: Callable[[Tensor], Tensor] = _alone
    reduce_scatter: Callable[[Tensor], Tensor] = _identity

    def slice(self, total: int) -> slice:
        """This rank's contiguous share of `total` rows."""
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True)
class StepRows:
    """How many rows the step in progress has in each replica, and whether any of them prefills."""

    counts: tuple[int, ...]
    prefills: bool


@dataclass(frozen=True)
class Replicas:
    """Attention that is data parallel: `count` replicas with requests of their own, of which this
    process belongs to number `rank`, while the experts of all processes work on the rows of all.

    `everybody` holds the processes of all replicas, one replica after the other; `rows` takes the
    rows that this replica has and says how many each has, the same in all processes. A replica may
    have fewer rows than it says, never more.
    """

    rank: int
    count: int
    everybody: Group
    rows: Callable[[int], StepRows]


@dataclass(frozen=True)
class Parallel:
    """Groups of one process. Every size is 1 unless given.

    `attention` splits heads and output groups, `expert` splits the routed experts by index,
    `expert_tensor` splits each expert's intermediate size, `shared` that of the shared expert,
    `vocab` the rows of embedding and head. With `replicas`, the last two and `attention` are groups
    within one replica. `layers` are those of the backbone in this stage of a pipeline, of which the
    first embeds and the last holds the head; None is all of them.
    """

    attention: Group = field(default_factory=Group)
    expert: Group = field(default_factory=Group)
    expert_tensor: Group = field(default_factory=Group)
    shared: Group = field(default_factory=Group)
    vocab: Group = field(default_factory=Group)
    replicas: Replicas | None = None
    layers: range | None = None

    def stage(self, geometry: Geometry) -> range:
        """The backbone's layers in this process."""
        return range(geometry.num_hidden_layers) if self.layers is None else self.layers

    def is_last(self, geometry: Geometry) -> bool:
        """Whether this process holds the last layer of the backbone."""
        return self.stage(geometry).stop == geometry.num_hidden_layers

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


def layout(tp: int, ep: int = 1, attn_dp: int = 1) -> Parallel:
    """The groups of one of `tp` processes as the host makes them, by their sizes alone: `ep` groups
    hold different experts, `attn_dp` replicas of the attention have requests of their own."""
    replica = Group(size=tp // attn_dp)
    return Parallel(replica, Group(size=ep), Group(size=tp // ep), replica, replica)
