"""Mixture of experts of one layer (docs/model.md §3.5)."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import moe, route, shared_expert
from ..ops.operator import step_of_all
from .agreement import Agreement
from .build import Build
from .linear import Activation
from .step import Step


class Gate(nn.Module):
    """Router: a learned bias, or a table from token id to experts in hash-routed layers."""

    def __init__(self, build: Build, hash_routed: bool):
        super().__init__()
        geometry = build.geometry
        self.weight = build.rows(geometry.n_routed_experts, geometry.hidden_size).weight
        self.bias = None if hash_routed else build.fp32(geometry.n_routed_experts)
        self.tid2eid = (
            build.int64(geometry.vocab_size, geometry.num_experts_per_tok) if hash_routed else None
        )


class Experts(nn.Module):
    """Weights of the routed experts that this process holds, stacked."""

    def __init__(self, build: Build):
        super().__init__()
        geometry, parallel = build.geometry, build.parallel
        count = geometry.n_routed_experts // parallel.expert.size
        hidden, intermediate = (
            geometry.hidden_size,
            geometry.moe_intermediate_size // parallel.expert_tensor.size,
        )
        self.first = parallel.expert.rank * count
        self.w1 = build.experts(count, intermediate, hidden)
        self.w2 = build.experts(count, hidden, intermediate)
        self.w3 = build.experts(count, intermediate, hidden)


class SharedExpert(nn.Module):
    """Weights of the shared expert's share of this process."""

    def __init__(self, build: Build):
        super().__init__()
        hidden = build.geometry.hidden_size
        intermediate = build.geometry.moe_intermediate_size // build.parallel.shared.size
        self.w1 = build.fp8(intermediate, hidden)
        self.w2 = build.fp8(hidden, intermediate)
        self.w3 = build.fp8(intermediate, hidden)


class FeedForward(nn.Module):
    """Routed experts and the shared expert."""

    def __init__(self, build: Build, layer: int):
        super().__init__()
        geometry, parallel = build.geometry, build.parallel
        self.topk, self.scaling = geometry.num_experts_per_tok, geometry.routed_scaling_factor
        self.layer, self.limit = layer, geometry.swiglu_limit
        self.gate = Gate(build, geometry.is_hash_routed(layer))
        self.experts = Experts(build)
        self.shared_experts = SharedExpert(build)
        self._prepared: tuple | None = None
        # A table chooses the same on every rank; weights that differ in the last bit are no harm.
        deciding = (
            () if geometry.is_hash_routed(layer) else (parallel.expert, parallel.expert_tensor)
        )
        self._agree = Agreement("experts", *deciding)
        self._sum_experts = parallel.expert.all_reduce, parallel.expert_tensor.all_reduce
        self._sum_shared = parallel.shared.all_reduce
        # Where the same processes hold shares of both, what they hold is added before it is sent.
        self._together = parallel.shared.size == parallel.expert.size * parallel.expert_tensor.size

    def prepare(self) -> None:
        """Gives up the released weights of the experts for those that the implementation asked for
        by name reads, where it reads others. Raises SelectionError where it cannot take them."""
        matrices = self.experts.w1, self.experts.w2, self.experts.w3
        parts = [part for each in matrices for part in (each.weight, each.scale)]
        self._prepared = moe.prepared(self.layer, *parts)
        if self._prepared is not None:
            for each in matrices:
                each.weight = each.scale = None

    @property
    def is_prepared(self) -> bool:
        return self._prepared is not None

    def forward(self, x: Activation, step: Step) -> Tensor:
        """[T, d] of normed `x` [T, d]; sums are fp32, and one message adds up both shares."""
        x, rows = x.values, step.rows
        gate, shared = self.gate, self.shared_experts
        weights, chosen = route(
            x, gate.weight, gate.bias, gate.tid2eid, step.token_ids, self.topk, self.scaling
        )
        if rows is None:
            chosen, weights = self._agree(chosen, weights)
            routed = self._routed(x, weights, chosen)
        else:
            everything = rows.gather(x, weights, chosen)
            with step_of_all(rows.prefills):
                routed = self._routed(*everything)
        own = shared_expert(
            x,
            shared.w1.weight,
            shared.w1.scale,
            shared.w2.weight,
            shared.w2.scale,
            shared.w3.weight,
            shared.w3.scale,
            self.limit,
        )
        if rows is not None:
            return rows.scatter(routed, own).to(x.dtype)
        if self._together:
            return self._sum_shared(routed + own).to(x.dtype)
        for all_reduce in self._sum_experts:
            routed = all_reduce(routed)
        return (routed + self._sum_shared(own)).to(x.dtype)

    def _routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """fp32 [T, d]: what this process's experts add."""
        experts = self.experts
        matrices = self._prepared or (
            experts.w1.weight,
            experts.w1.scale,
            experts.w2.weight,
            experts.w2.scale,
            experts.w3.weight,
            experts.w3.scale,
        )
        return moe(x, weights, chosen, *matrices, self.limit, experts.first)
