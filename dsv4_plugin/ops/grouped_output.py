"""Output projection, first half: one matrix per group of heads (docs/model.md §3.2, step 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import dense_weight, quantize_fp8
from .operator import Implementation, operator


@operator
def grouped_output(
    o: Tensor, weight: Tensor, scale: Tensor | None, groups: int, quantize: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """[T, groups·rank] in the dtype of `o` [T, h, 512], whose heads form `groups` groups of
    consecutive heads.

    `o` is rotated back already, by `sparse_mla`. `weight` [groups·rank, h/groups·512] holds the
    groups' matrices one after the other, dense or FP8 with 128×128 block scales. With `quantize`
    the result is what the next product reads: e4m3 [T, groups·rank] and fp32 scales [T,
    groups·rank/128]. An implementation may also quantise `o` per token in blocks of 128.
    """
    weight = dense_weight(weight, scale, o.dtype)
    # groups first: [g, T, i] times [g, i, r]
    rows = o.to(weight.dtype).view(o.shape[0], groups, weight.shape[1]).transpose(0, 1)
    z = rows @ weight.unflatten(0, (groups, -1)).transpose(1, 2)
    z = z.transpose(0, 1).flatten(1).to(o.dtype)
    return quantize_fp8(z, 128) if quantize else z


def _needs_whole_blocks(
    o: Tensor, weight: Tensor, scale: Tensor | None, groups: int, quantize: bool = False
) -> str | None:
    if o.dtype != torch.bfloat16:
        return f"o is {o.dtype}, not bfloat16"
    rank = weight.shape[0] // groups
    return f"a group has {rank} results, no multiple of 128" if rank % 128 else None


grouped_output.add(
    Implementation(
        "triton",
        "dsv4_plugin.kernels.triton.grouped_output:grouped_output",
        packages=("triton",),
        fp8=True,
        requires=_needs_whole_blocks,
    )
)
