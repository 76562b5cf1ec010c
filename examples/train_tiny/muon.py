"""Muon for matrices, Adam for the rest (Jordan et al. 2024: momentum, orthogonalised by
Newton-Schulz iterations)."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalized(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: all singular values of `matrix` [..., m, n]
    moved near 1, in fp32."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for parameters [..., m, n]; torch's own takes no stacks
    and computes in bf16."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                velocity = state.setdefault("velocity", torch.zeros_like(parameter))
                velocity.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(velocity, group["momentum"]))
                rows, columns = parameter.shape[-2:]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
