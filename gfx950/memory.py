"""Vector memory instructions: global, buffer and scratch accesses, loads into LDS, atomics
(CDNA4 ISA, "Vector Memory Operations")."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import floats
from .code_object import Kernel
from .operands import Run, raw_vector, scalar
from .program import M0, OFF, Instruction, signed
from .waves import F32, I64, LANES, U8, U32, U64, Fault, Waves

_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def gather(memory: np.ndarray, at: np.ndarray, size: int) -> list[np.ndarray]:
    """Registers [waves, 64] of `size` bytes at each place of `at`."""
    if size < 4:
        value = memory[at].astype(U32)
        return [value | memory[at + 1].astype(U32) << 8] if size == 2 else [value]
    if not (at & 3).any():
        words, first = memory.view(U32), at >> 2
        return [words[first + n if n else first] for n in range(size // 4)]
    octets = memory[at[..., None] + np.arange(size)]
    words = octets.view(U32)
    return [words[..., n] for n in range(size // 4)]


def scatter(memory: np.ndarray, at: np.ndarray, values: list[np.ndarray], size: int) -> None:
    """Writes registers, given as flat arrays, to their places; of lanes at one place the last
    wins."""
    if size >= 4 and not (at & 3).any():
        words = memory.view(U32)
        for n, value in enumerate(values):
            words[(at >> 2) + n] = value
    else:
        for n in range(size):
            memory[at + n] = (values[n // 4] >> 8 * (n % 4)).astype(U8)


def chosen(w: Waves, array: np.ndarray, active: np.ndarray | None) -> np.ndarray:
    """`array` [waves, 64] as a flat array of the active lanes."""
    return array.ravel() if active is None else array[active]


def stored(w: Waves, i: Instruction, row: int, count: int, active: np.ndarray | None) -> list:
    """Registers as flat arrays of the active lanes; the upper half of one with _d16_hi."""
    values = [chosen(w, w.vector[row + n], active) for n in range(count)]
    return [value >> 16 for value in values] if i.name.endswith("_d16_hi") else values


def _placed(kind: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """What a load leaves in its register: (old register, value) to new."""
    if kind.startswith(("sbyte", "i8")):
        return lambda old, v: v.astype(np.int8).astype(np.int32).view(U32)
    if kind.endswith("_d16_hi"):
        return lambda old, v: old & 0xFFFF | v << 16
    if kind.endswith("_d16"):
        return lambda old, v: old & 0xFFFF0000 | v & 0xFFFF
    if kind.startswith(("sshort", "i16")):
        return lambda old, v: v.astype(np.int16).astype(np.int32).view(U32)
    return lambda old, v: v


def receive(w: Waves, i: Instruction, counter: str, row: int, values: list[np.ndarray]) -> None:
    """Registers from `row` on get `values` [waves, 64] when the load arrives, in lanes that are
    active now."""
    place = _placed(i.name.split("_", 2)[2])
    everywhere, lanes = w.all, w.exec

    def deliver() -> None:
        for n, value in enumerate(values):
            value = place(w.vector[row + n], value)
            np.copyto(w.vector[row + n], value, where=True if everywhere else lanes)

    w.issue(i, counter, deliver, w.vector[row : row + len(values)])


def _size(i: Instruction) -> int:
    """Bytes of a lane's access."""
    if "atomic" in i.name:
        return 8 if i.name.endswith(("_x2", "_f64")) else 4
    found = re.search(r"_(?:load|store)_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)", i.name)
    return _BYTES[found[1]]


def _global_place(i: Instruction) -> Callable[[Waves], tuple]:
    """(uint64 addresses, None) of a global access."""
    step, row = U64(signed(i.get("offset"), 13) & (1 << 64) - 1), i.get("addr") - 256
    if i.get("saddr") == OFF:
        pair = raw_vector(row, "U")
        return lambda w: (pair(w) + step, None)
    base = scalar(i.get("saddr"), None, "U")
    return lambda w: (base(w)[:, None] + w.vector[row].astype(U64) + step, None)


def _buffer_place(i: Instruction, size: int) -> Callable[[Waves], tuple]:
    """(uint64 addresses, which lanes are within the buffer) of a buffer access without index."""
    resource, row, step = i.get("srsrc"), i.get("vaddr") - 256, i.get("offset")
    more = scalar(i.get("soffset"), None, "u")
    if i.get("idxen"):
        raise NotImplementedError("buffer accesses with an index")

    def where(w: Waves) -> tuple[np.ndarray, np.ndarray]:
        high = (w.scalar[resource + 1] & 0xFFFF).astype(U64) << 32
        base = (w.scalar[resource].astype(U64) | high)[:, None]
        limit = w.scalar[resource + 2].astype(I64)[:, None]
        start = np.asarray(more(w)).astype(I64).reshape(-1, 1)
        # Register and constant are added in 32 bits: LLVM splits an offset into a register below
        # zero and a constant.
        own = w.vector[row] + step if i.get("offen") else np.full(w.exec.shape, step, U32)
        offset = own.astype(I64) + start
        return base + offset.astype(U64), offset + size <= limit

    return where


def _scratch_places(i: Instruction, kernel: Kernel, size: int) -> Callable[[Waves], np.ndarray]:
    """Places in the launch's scratch: every lane has its own. Raises Fault outside of them."""
    step, row, base = signed(i.get("offset"), 13), i.get("addr") - 256, i.get("saddr")

    def where(w: Waves) -> np.ndarray:
        offset = np.full(w.exec.shape, step, I64)
        if i.get("sve"):
            offset = offset + w.vector[row].astype(np.int32)
        if base != OFF:
            offset = offset + w.scalar[base].astype(np.int32)[:, None]
        outside = ((offset < 0) | (offset + size > w.shared.scratch_size)) & w.exec
        if outside.any():
            raise Fault(f"scratch offset {offset[outside][0]} of {w.shared.scratch_size} bytes")
        lane = w.slot[:, None] * LANES + np.arange(LANES)
        return lane * w.shared.scratch_size + np.where(w.exec, offset, 0)

    return where


def _access(i: Instruction, kernel: Kernel, how: str) -> Callable[[Waves], tuple]:
    """(bytes that hold it, places, lanes that access them (None: all), lanes within the buffer
    (None: all)) of an access; the watches are told by `told`."""
    size = _size(i)
    if i.form.startswith("SCRATCH"):
        places = _scratch_places(i, kernel, size)
        return lambda w: (w.shared.scratch, places(w), w.active, None)
    where = _buffer_place(i, size) if i.form.startswith("MUBUF") else _global_place(i)

    def find(w: Waves) -> tuple:
        addresses, inside = where(w)
        inside = None if inside is None or inside.all() else inside
        active = w.active if inside is None else inside & w.exec
        return (
            w.shared.memory.bytes,
            w.shared.memory.places(addresses, size, active),
            active,
            inside,
        )

    return find


def _told(w: Waves, i: Instruction, how: str, at, size: int, active, values=()) -> None:
    if not i.form.startswith("SCRATCH"):
        for each in w.shared.watches:
            each.memory(w, i, how, at, size, active, values)


def _loaded(w: Waves, i: Instruction, find: Callable, size: int) -> list[np.ndarray]:
    """Registers [waves, 64] of a load; 0 outside of a buffer."""
    memory, at, active, inside = find(w)
    _told(w, i, "read", at, size, active)
    values = gather(memory, at, size)
    return values if inside is None else [np.where(inside, value, U32(0)) for value in values]


def _load(i: Instruction, kernel: Kernel) -> Run:
    size, find = _size(i), _access(i, kernel, "read")
    row = i.get("vdst" if i.has("vdst") else "vdata") - 256
    row += kernel.accumulators_at if i.get("acc") else 0
    return lambda w: receive(w, i, "vector", row, _loaded(w, i, find, size))


def _store(i: Instruction, kernel: Kernel) -> Run:
    size, find = _size(i), _access(i, kernel, "write")
    row = i.get("data" if i.has("data") else "vdata") - 256
    row += kernel.accumulators_at if i.get("acc") else 0

    def run(w: Waves) -> None:
        memory, at, active, _ = find(w)
        values = stored(w, i, row, max(1, size // 4), active)
        _told(w, i, "write", at, size, active, values)
        scatter(memory, chosen(w, at, active), values, size)
        w.issue(i, "vector")

    return run


def check_lds(w: Waves, at: np.ndarray, size: int) -> None:
    """Raises Fault where active lanes access LDS outside of their workgroup's."""
    outside = ((at < 0) | (at > w.shared.lds_size - size)) & w.exec
    if outside.any():
        first = np.broadcast_to(at, w.exec.shape)[outside][:4]
        raise Fault(f"{size} bytes at LDS offset {first} of {w.shared.lds_size}")


def _load_to_lds(i: Instruction, kernel: Kernel) -> Run:
    """A load whose data go to LDS at M0 + offset + lane · size, no register in between."""
    size, find = _size(i), _access(i, kernel, "read")
    step = i.get("offset") if i.form.startswith("MUBUF") else signed(i.get("offset"), 13)
    lane = np.arange(LANES) * size

    def run(w: Waves) -> None:
        values = _loaded(w, i, find, size)
        target = w.scalar[M0].astype(I64)[:, None] + step + lane
        check_lds(w, target, size)
        target = target + w.lds_at
        values, active = [chosen(w, value, w.active) for value in values], w.active
        for each in w.shared.watches:
            each.local(w, i, "direct", target, size, active, values)
        places = chosen(w, target, active)
        w.issue(i, "vector", lambda: scatter(w.shared.lds, places, values, size))

    return run


def _bf16_sum(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    halves = zip(old.view(np.uint16).reshape(-1, 2).T, new.view(np.uint16).reshape(-1, 2).T)
    sums = [floats.to_bf16(floats.from_bf16(a) + floats.from_bf16(b)) for a, b in halves]
    return sums[0] | sums[1] << 16


def _f16_sum(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return (old.view(np.float16) + new.view(np.float16)).view(U32)


def _integers(function: Callable) -> Callable:
    """A function of signed numbers on the bits of unsigned ones."""
    kind = {4: np.int32, 8: np.int64}
    return lambda old, new: function(*(x.view(kind[x.dtype.itemsize]) for x in (old, new))).view(
        old.dtype
    )


def _reals(function: Callable) -> Callable:
    kind = {4: F32, 8: np.float64}
    return lambda old, new: function(*(x.view(kind[x.dtype.itemsize]) for x in (old, new))).view(
        old.dtype
    )


_ATOMIC = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "umin": np.minimum,
    "umax": np.maximum,
    "smin": _integers(np.minimum),
    "smax": _integers(np.maximum),
    "swap": lambda old, new: new,
    "add_f32": _reals(np.add),
    "add_f64": _reals(np.add),
    "pk_add_bf16": _bf16_sum,
    "pk_add_f16": _f16_sum,
}
"""(old value, data) to new value, by the operation of a global atomic."""


def _joined(w: Waves, row: int, words: int, active: np.ndarray) -> np.ndarray:
    """One or two registers as flat unsigned numbers of the active lanes."""
    low = w.vector[row][active]
    return low if words == 1 else low.astype(U64) | w.vector[row + 1][active].astype(U64) << 32


def atomic(i: Instruction, kernel: Kernel, find: Callable, operation: str, size: int) -> Run:
    """A read-modify-write of each lane in turn, in global memory or LDS."""
    function, words, in_lds = _ATOMIC.get(operation), size // 4, i.form.startswith("DS")
    if function is None and operation != "cmpswap":
        raise NotImplementedError(i.name)
    at_acc = kernel.accumulators_at if i.get("acc") else 0
    data = i.get("data0" if in_lds else "data" if i.has("data") else "vdata") - 256 + at_acc
    row = i.get("vdst" if i.has("vdst") else "vdata") - 256 + at_acc
    returns = "_rtn" in i.name if in_lds else bool(i.get("sc0"))

    def run(w: Waves) -> None:
        memory, at, active, _ = find(w)
        active = w.exec if active is None else active
        places, values = at[active], _joined(w, data, words, active)
        if (places % size).any():
            raise Fault(f"atomic of {size} bytes at a place that they do not divide")
        for each in w.shared.watches:
            told = each.local if in_lds else each.memory
            told(w, i, "atomic", at, size, active, ())
        cells, places = memory.view(values.dtype), places // size
        compare = None if function else _joined(w, data + words, words, active)
        before = np.empty_like(values)
        alone = len(np.unique(places)) == len(places)
        for part in [slice(None)] if alone else [slice(n, n + 1) for n in range(len(places))]:
            old = before[part] = cells[places[part]]
            new = values[part]
            changed = function(old, new) if function else np.where(old == compare[part], new, old)
            cells[places[part]] = changed

        def deliver() -> None:
            for n in range(words if returns else 0):
                w.vector[row + n][active] = (before >> before.dtype.type(32 * n)).astype(U32)

        registers = w.vector[row : row + words] if returns else None
        w.issue(i, "local" if in_lds else "vector", deliver, registers)

    return run


def _global_atomic(i: Instruction, kernel: Kernel) -> Run:
    operation = i.name.split("_atomic_")[1].removesuffix("_x2")
    return atomic(i, kernel, _access(i, kernel, "atomic"), operation, _size(i))


_KINDS: list[tuple[str, Callable[[Instruction, Kernel], Run]]] = [
    (r"(global|buffer)_atomic_\w+", _global_atomic),
    (r"global_load_lds_\w+", _load_to_lds),
    (r"(global|buffer|scratch)_load_\w+", _load),
    (r"(global|buffer|scratch)_store_\w+", _store),
]


def compile_memory(i: Instruction, kernel: Kernel) -> Run | None:
    """The instruction as a function of the waves, None when it is not known here."""
    if i.form.startswith("MUBUF") and i.get("lds"):
        return _load_to_lds(i, kernel)
    for pattern, make in _KINDS:
        if re.fullmatch(pattern, i.name):
            return make(i, kernel)
    return None
