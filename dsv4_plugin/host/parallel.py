"""The host's process groups as our parallel layout."""

from __future__ import annotations

import torch
from sglang.srt.distributed.utils import get_pp_indices
from sglang.srt.layers import dp_attention
from sglang.srt.model_executor.forward_context import has_forward_context
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from ..parallel import Group, Parallel, Replicas, StepRows


def _group(coordinator) -> Group:
    def all_reduce(x: Tensor) -> Tensor:
        # The host reduces in place where it can; its CPU path takes contiguous tensors only.
        x = x.contiguous()
        if x.is_floating_point():
            return coordinator.all_reduce(x)
        torch.distributed.all_reduce(x, group=coordinator.device_group)  # its kernels add floats
        return x

    def all_gather(x: Tensor) -> Tensor:
        # Bits as floats: its kernels move no integers.
        sent = x.view(torch.float32) if x.dtype == torch.int32 else x
        return coordinator.all_gather(sent.unsqueeze(0), dim=0).view(x.dtype)

    def reduce_scatter(x: Tensor) -> Tensor:
        if not x.is_cpu:
            return coordinator.reduce_scatter_along_dim(x, dim=0)
        rows = x.shape[0] // coordinator.world_size  # gloo sums all or nothing
        return all_reduce(x).narrow(0, coordinator.rank_in_group * rows, rows)

    return Group(
        coordinator.rank_in_group,
        coordinator.world_size,
        all_reduce,
        coordinator.broadcast,
        all_gather,
        reduce_scatter,
    )


def _rows(own: int) -> StepRows:
    """What the host told all processes of the step in progress. Outside of its steps, when a model
    that was just loaded is tried, all replicas do the same."""
    counts = dp_attention.get_dp_global_num_tokens() if has_forward_context() else None
    if counts is None:
        return StepRows((own,) * get_parallel().attn_dp_size, False)
    return StepRows(tuple(counts), dp_attention.get_is_extend_in_batch())


def host_parallel(layers: int) -> Parallel:
    """This worker's layout of a model of `layers`, in stages: heads over attention TP, experts over
    MoE EP and TP, shared expert and vocabulary over TP, or where attention is data parallel over
    its TP."""
    groups = get_parallel()
    attention, everybody = _group(groups.attn_tp_group), _group(groups.tp_group)
    replicas, replica = None, everybody
    if groups.attn_dp_size > 1:
        replicas = Replicas(groups.attn_dp_rank, groups.attn_dp_size, everybody, _rows)
        replica = attention
    return Parallel(
        attention=attention,
        expert=_group(groups.moe_ep_group),
        expert_tensor=_group(groups.moe_tp_group),
        shared=replica,
        vocab=replica,
        replicas=replicas,
        layers=range(*get_pp_indices(layers, groups.pp_rank, groups.pp_size)),
    )
