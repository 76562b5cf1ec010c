"""Arithmetic whose rows do not depend on how many rows there are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RowsAlike(TorchFunctionMode):
    """Sums and elementary functions in float64, rounded to the dtype of their input.

    A matrix product sums in another order for another number of rows, and vectorised functions
    treat the last few values of a tensor differently: the last bit of a row depends on its
    neighbours, and one such bit can flip a rounding or a selection. In float64 those differences
    are 1e-16, so that two ways to compute the same rows agree to the bit in every precision, and
    tests of chunks and batches need no allowance for flips.
    """

    ROUNDED = frozenset(
        (
            F.linear,
            F.silu,
            F.softplus,
            torch.einsum,
            torch.matmul,
            torch.sigmoid,
            torch.rsqrt,
            torch.addcmul,
            torch.addmm,
            torch.baddbmm,
            torch.rms_norm,
            Tensor.matmul,
            Tensor.__matmul__,
            Tensor.softmax,
            Tensor.mean,
            Tensor.sum,
            Tensor.cos,
            Tensor.sin,
            Tensor.exp,
            Tensor.sigmoid,
        )
    )

    IN_PLACE = {Tensor.exp_: Tensor.exp, Tensor.rsqrt_: Tensor.rsqrt, Tensor.log_: Tensor.log}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.IN_PLACE:
            return args[0].copy_(self.IN_PLACE[func](args[0].double()))
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if func not in self.ROUNDED or not first.is_floating_point():
            return func(*args, **kwargs)
        wide = [a.double() if isinstance(a, Tensor) else a for a in args]
        return func(
            *wide, **{k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        ).to(first.dtype)
