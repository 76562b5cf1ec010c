"""The same arguments on another device: a call can be repeated there, and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Elsewhere:
    """Copies of values on `device`. Tensors keep their strides, and those that share memory share
    it there; dataclasses, mappings, sequences and stores of tensors are copied with what they hold.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}
        """(bytes here, bytes there) of each storage, by its address."""

    def __call__(self, value: Any) -> Any:
        """The copy of `value`."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return type(value)(**{name: self(each) for name, each in fields.items()})
        if isinstance(value, Mapping):
            return {key: self(each) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(self, value))
        if type(value).__module__.startswith(__package__.partition(".")[0]):  # a store
            copy = object.__new__(type(value))
            vars(copy).update({name: self(each) for name, each in vars(value).items()})
            return copy
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor.to(self.device)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._storages:
            here = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._storages[storage.data_ptr()] = here, here.to(self.device, copy=True)
        there = self._storages[storage.data_ptr()][1]
        shape = tensor.shape, tensor.stride(), tensor.storage_offset()
        return torch.empty(0, dtype=tensor.dtype, device=self.device).set_(
            there.untyped_storage(), shape[2], shape[0], shape[1]
        )

    def bring_back(self) -> None:
        """Writes what the copies hold now into the tensors they were made of."""
        for here, there in self._storages.values():
            here.copy_(there)
