"""The host's process groups as our parallel layout."""

from __future__ import annotations

from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from ..parallel import Group, Parallel


def _group(coordinator) -> Group:
    def all_reduce(x: Tensor) -> Tensor:
        # The host reduces in place where it can; its CPU path takes contiguous tensors only.
        return coordinator.all_reduce(x.contiguous())

    def all_gather(x: Tensor) -> Tensor:
        return coordinator.all_gather(x.unsqueeze(0), dim=0)

    return Group(
        coordinator.rank_in_group,
        coordinator.world_size,
        all_reduce,
        coordinator.broadcast,
        all_gather,
    )


def host_parallel() -> Parallel:
    """This worker's layout: heads over attention TP, experts over MoE EP and TP, shared expert and
    vocabulary over TP."""
    groups = get_parallel()
    return Parallel(
        attention=_group(groups.attn_tp_group),
        expert=_group(groups.moe_ep_group),
        expert_tensor=_group(groups.moe_tp_group),
        shared=_group(groups.tp_group),
        vocab=_group(groups.tp_group),
    )
