"""Output projection, first half: one matrix per group of heads (docs/model.md §3.2, step 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import dense_weight
from .operator import operator


@operator
def grouped_output(o: Tensor, weight: Tensor, scale: Tensor | None, groups: int) -> Tensor:
    """[T, groups·rank] in the dtype of `o` [T, h, 512], whose heads form `groups` groups of
    consecutive heads.

    `o` is rotated back already, by `sparse_mla`. `weight` [groups·rank, h/groups·512] holds the
    groups' matrices one after the other, dense or FP8 with 128×128 block scales.
    """
    weight = dense_weight(weight, scale, o.dtype)
    o = o.reshape(o.shape[0], groups, weight.shape[1])
    return torch.einsum("tgi,gri->tgr", o, weight.unflatten(0, (groups, -1))).flatten(1)
