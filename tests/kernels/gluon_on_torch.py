"""Runs a Gluon kernel on the CPU: its Python is executed with `gl` meaning torch, program by
program.

Gluon has no interpreter. Layouts say where data lies, not what it is, so they are ignored here;
what is checked is everything the kernel computes. Every load and store is checked to lie within a
tensor that was passed, local memory starts as NaN, bf16 is rounded as on the GPU, and products
accumulate in fp32. Not checked: the machine code, and races between waves (the compiler places
Gluon's barriers).
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction

_DTYPES = {
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8e4nv": torch.float8_e4m3fn,
}


class Anything:
    """A layout: has every attribute, takes every call."""

    def __getattr__(self, name: str) -> Anything:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Anything:
        return self


class PointerType:
    def __init__(self, dtype: torch.dtype):
        self.dtype = self.element_ty = dtype


class Tile:
    """A value of the kernel: a torch tensor, or addresses of elements of `pointee`."""

    type = Anything()

    def __init__(self, data: Any, pointee: torch.dtype | None = None):
        self.data, self.pointee = torch.as_tensor(data), pointee

    @property
    def dtype(self) -> Any:
        return PointerType(self.pointee) if self.pointee else self.data.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def to(self, dtype: Any, bitcast: bool = False) -> Tile:
        if isinstance(dtype, PointerType):
            return Tile(self.data, dtype.dtype)
        return Tile(self.data.view(dtype) if bitcast else self.data.to(dtype))

    def broadcast_to(self, shape: list[int]) -> Tile:
        return Tile(self.data.expand(shape))

    def __getitem__(self, index: Any) -> Tile:
        return Tile(self.data[index], self.pointee)

    def _with(self, other: Any, operation: str, reflected: bool = False) -> Tile:
        value = other.data if isinstance(other, Tile) else other
        if self.pointee:
            return Tile(self.data + value * self.pointee.itemsize, self.pointee)
        if isinstance(value, Tensor) and isinstance(other, Tile) and other.pointee:
            return Tile(other.data + self.data * other.pointee.itemsize, other.pointee)
        return Tile(
            getattr(torch.Tensor, operation)(self.data, value)
            if not reflected
            else getattr(torch.Tensor, operation)(torch.as_tensor(value), self.data)
        )

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "rshift",
    "lshift",
    "and",
    "lt",
    "ge",
    "gt",
    "le",
    "eq",
):
    setattr(Tile, f"__{_name}__", lambda self, other, name=f"__{_name}__": self._with(other, name))
    setattr(
        Tile,
        f"__r{_name}__",
        lambda self, other, name=f"__{_name}__": self._with(other, name, True),
    )


class Memory:
    """Local memory."""

    def __init__(self, data: Tensor):
        self.data, self.shape = data, list(data.shape)

    def index(self, at: int) -> Memory:
        return Memory(self.data[at])

    def permute(self, order: list[int]) -> Memory:
        return Memory(self.data.permute(order))

    def store(self, value: Tile) -> None:
        assert value.data.dtype == self.data.dtype
        self.data.copy_(value.data)

    def load(self, layout: Any) -> Tile:
        return Tile(self.data.clone())


def _bare(value: Any) -> Any:
    return value.data if isinstance(value, Tile) else value


class Language:
    """What `gl` means here, for one launch over `tensors`."""

    constexpr = None
    amd = types.SimpleNamespace(AMDMFMALayout=Anything(), cdna4=types.SimpleNamespace())
    BlockedLayout = SliceLayout = DotOperandLayout = DistributedLinearLayout = (
        SwizzledSharedLayout
    ) = Anything()
    PaddedSharedLayout = Anything()
    pointer_type = PointerType

    def __init__(self, tensors: list[Tensor]):
        self.tensors, self.program = tensors, (0, 0, 0)
        vars(self).update(_DTYPES)
        self.amd.cdna4.mfma, self.amd.cdna4.scaled_upcast = self.mfma, self.scaled_upcast

    def _access(self, pointer: Tile, inside: Tensor) -> Any:
        """(tensor as elements of the pointee, which addresses are in it, their places) of every
        tensor pointed into."""
        seen = torch.zeros_like(inside)
        for tensor in self.tensors:
            memory = tensor.view(torch.uint8).view(-1).view(pointer.pointee)
            offset = pointer.data - tensor.data_ptr()
            mine = inside & (offset >= 0) & (offset < tensor.nbytes)
            assert (offset[mine] % pointer.pointee.itemsize == 0).all(), "unaligned access"
            seen |= mine
            yield memory, mine, offset[mine] // pointer.pointee.itemsize
        assert (seen == inside).all(), "access outside every tensor"

    def _mask(self, pointer: Tile, mask: Any) -> Tensor:
        return (
            torch.ones_like(pointer.data, dtype=torch.bool)
            if mask is None
            else mask.data.expand(pointer.data.shape)
        )

    def load(self, pointer: Tile, mask: Any = None, other: Any = 0) -> Tile:
        inside = self._mask(pointer, mask)
        out = torch.full(pointer.data.shape, other, dtype=pointer.pointee)
        for memory, mine, place in self._access(pointer, inside):
            out[mine] = memory[place]
        return Tile(out)

    def store(self, pointer: Tile, value: Any, mask: Any = None) -> None:
        for memory, mine, place in self._access(pointer, self._mask(pointer, mask)):
            memory[place] = value.data.to(pointer.pointee).expand(mine.shape)[mine]

    def inline_asm_elementwise(
        self, text: str, constraints: str, args: list, dtype: Any, is_pure: bool, pack: int
    ) -> int:
        assert text == "s_nop 0\nv_readfirstlane_b32 $0, $1", (
            "only the move of a uniform value to a scalar register is known"
        )
        return int(args[0].data)

    def mfma(self, a: Tile, b: Tile, accumulator: Tile) -> Tile:
        assert a.data.dtype == b.data.dtype == torch.bfloat16
        return Tile(accumulator.data + a.data.float() @ b.data.float())

    def scaled_upcast(self, values: Tile, scale: Tile, dtype: torch.dtype) -> Tile:
        assert scale.data.dtype == torch.uint8
        return Tile((values.data.float() * torch.exp2(scale.data.float() - 127)).to(dtype))

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Memory:
        return Memory(torch.full(shape, float("nan"), dtype=dtype))

    def program_id(self, axis: int) -> Tile:
        return Tile(torch.tensor(self.program[axis], dtype=torch.int32))

    def arange(self, start: int, end: int, layout: Any = None) -> Tile:
        return Tile(torch.arange(start, end, dtype=torch.int32))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        pointee = a.pointee if isinstance(a, Tile) else None
        if isinstance(condition, bool):
            return a if condition else b
        return Tile(torch.where(_bare(condition), _bare(a), _bare(b)), pointee)

    def minimum(self, a: Any, b: Any) -> Tile:
        return Tile(torch.minimum(torch.as_tensor(_bare(a)), torch.as_tensor(_bare(b))))

    def maximum(self, a: Any, b: Any) -> Tile:
        return Tile(torch.maximum(torch.as_tensor(_bare(a)), torch.as_tensor(_bare(b))))

    def full(self, shape: list[int], value: float, dtype: torch.dtype, layout: Any = None) -> Tile:
        return Tile(torch.full(shape, value, dtype=dtype))

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: Any = None) -> Tile:
        return Tile(torch.zeros(shape, dtype=dtype))

    static_range = staticmethod(range)
    convert_layout = staticmethod(lambda value, layout, assert_trivial=False: value)
    multiple_of = staticmethod(lambda value, n: value)
    cdiv = staticmethod(lambda a, b: -(-int(_bare(a)) // int(b)))
    max = staticmethod(lambda x, axis: Tile(x.data.amax(axis)))
    sum = staticmethod(lambda x, axis: Tile(x.data.sum(axis)))
    exp2 = staticmethod(lambda x: Tile(torch.exp2(x.data)))
    log2 = staticmethod(lambda x: Tile(torch.log2(x.data)))
    split = staticmethod(lambda x: tuple(Tile(half) for half in x.data.unbind(-1)))
    join = staticmethod(lambda a, b: Tile(torch.stack((a.data, b.data), -1)))
    reshape = staticmethod(lambda x, shape: Tile(x.data.reshape(shape)))
    expand_dims = staticmethod(lambda x, axis: Tile(x.data.unsqueeze(axis)))


def launcher(kernel: GluonJITFunction) -> Any:
    """Takes the place of `kernel`: launcher(kernel)[grid](*args, **constants) runs it here."""

    class Launcher:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *args, **constants: _run(kernel, grid, args, constants)

    return Launcher()


def _argument(value: Tensor | int | float) -> Tile:
    if isinstance(value, Tensor):
        return Tile(torch.tensor(value.data_ptr()), value.dtype)
    return Tile(
        torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int32)
    )


def _run(
    kernel: GluonJITFunction, grid: tuple[int, int, int], args: tuple, constants: dict[str, Any]
) -> None:
    tensors = list(
        {
            tensor.data_ptr(): tensor
            for tensor in args
            if isinstance(tensor, Tensor) and tensor.numel()
        }.values()
    )
    language = Language(tensors)
    namespace = {
        name: getattr(value, "value", value) for name, value in kernel.fn.__globals__.items()
    }
    namespace |= {"gl": language, kernel.fn.__name__: kernel}
    for name, value in list(namespace.items()):
        if isinstance(value, GluonJITFunction):
            namespace[name] = types.FunctionType(
                value.fn.__code__, namespace, name, value.fn.__defaults__
            )
    constants = {
        name: value
        for name, value in constants.items()
        if name not in ("num_warps", "waves_per_eu")
    }
    values = [_argument(each) for each in args]
    for x in range(grid[0]):
        for y in range(grid[1]):
            for z in range(grid[2]):
                language.program = (x, y, z)
                namespace[kernel.fn.__name__](*values, **constants)
