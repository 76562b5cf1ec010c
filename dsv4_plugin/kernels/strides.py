"""What a launcher takes for granted of its tensors' memory, asserted and never made so by a copy: a
copy nobody asked for costs a launch and the tensor's bytes at every step."""

from __future__ import annotations

from torch import Tensor


def require_contiguous(operator: str, **tensors: Tensor) -> None:
    """Raises ValueError for the first of the tensors, given by name, that is not contiguous."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(_refusal(operator, name, tensor, "contiguous"))


def require_dense_rows(operator: str, **tensors: Tensor) -> None:
    """Raises ValueError for the first of the tensors whose last dimension has a stride; their rows
    may lie apart."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(_refusal(operator, name, tensor, "dense in its last dimension"))


def _refusal(operator: str, name: str, tensor: Tensor, wanted: str) -> str:
    return (
        f"{operator}: {name} {list(tensor.shape)} has strides {list(tensor.stride())}, but the"
        f" kernel reads it as {wanted}; give it one that is"
    )
