"""Accesses of global memory, buffers, scratch and LDS: loads, stores, loads into LDS, atomics
(CDNA4 ISA, "Vector Memory Operations" and "Data Share Operations")."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import floats
from .code_object import Kernel
from .operands import Kinds, Run, raw_vector, scalar
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


def chosen(array: np.ndarray, active: np.ndarray | None) -> np.ndarray:
    """`array` [waves, 64] as a flat array of the active lanes."""
    return array.ravel() if active is None else array[active]


def row_of(i: Instruction, kernel: Kernel, *fields: str) -> int:
    """Row of the data that the first of `fields` which the encoding has names."""
    code = i.get(next(field for field in fields if i.has(field)))
    return code - 256 + (kernel.accumulators_at if i.get("acc") else 0)


def _stored(w: Waves, i: Instruction, row: int, size: int, active: np.ndarray | None) -> list:
    """Registers as flat arrays of the active lanes; the upper half of one with _d16_hi."""
    values = [chosen(w.vector[row + n], active) for n in range(max(1, size // 4))]
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


def receive(w: Waves, i: Instruction, row: int, values: list[np.ndarray]) -> None:
    """Registers from `row` on get `values` [waves, 64] when the load arrives, in lanes that are
    active now."""
    place = _placed(i.name.split("_", 2)[2])
    everywhere, lanes = w.all, w.exec

    def deliver() -> None:
        for n, value in enumerate(values):
            value = place(w.vector[row + n], value)
            np.copyto(w.vector[row + n], value, where=True if everywhere else lanes)

    w.issue(i, deliver, w.vector[row : row + len(values)])


def size_of(i: Instruction) -> int:
    """Bytes of a lane's access."""
    if i.form.startswith("DS"):
        return int(re.search(r"_[buif](\d+)", i.name)[1]) // 8
    if "atomic" in i.name:
        return 8 if i.name.endswith(("_x2", "_f64")) else 4
    found = re.search(r"_(?:load|store)_(?:lds_)?[us]?(byte|short|dword(?:x\d)?)", i.name)
    return _BYTES[found[1]]


def local_offsets(i: Instruction) -> list[int]:
    """Bytes that are added to the address of an LDS instruction, for each of its accesses."""
    two = re.match(r"ds_(?:read|write)2(st64)?_", i.name)
    if two:
        unit = size_of(i) * (64 if two[1] else 1)
        return [i.get("offset0") * unit, i.get("offset1") * unit]
    return [i.get("offset0") | i.get("offset1") << 8]


def _local_find(i: Instruction, step: int) -> Callable[[Waves], tuple]:
    row, size = i.get("addr") - 256, size_of(i)

    def find(w: Waves) -> tuple:
        at = w.vector[row].astype(I64) + step
        _check_lds(w, at, size)
        return w.shared.lds, np.where(w.exec, at, 0) + w.lds_at, w.active, None

    return find


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


def accesses(i: Instruction, kernel: Kernel) -> list[Callable[[Waves], tuple]]:
    """Functions that give (bytes that hold it, places, lanes that access them (None: all), lanes
    within the buffer (None: all)) of each access of an instruction."""
    size = size_of(i)
    if i.form.startswith("DS"):
        return [_local_find(i, step) for step in local_offsets(i)]
    if i.form.startswith("SCRATCH"):
        places = _scratch_places(i, kernel, size)
        return [lambda w: (w.shared.scratch, places(w), w.active, None)]
    where = _buffer_place(i, size) if i.form.startswith("MUBUF") else _global_place(i)

    def find(w: Waves) -> tuple:
        addresses, inside = where(w)
        inside = None if inside is None or inside.all() else inside
        active = w.active if inside is None else inside & w.exec
        at = w.shared.memory.places(addresses, size, active)
        return w.shared.memory.bytes, at, active, inside

    return [find]


def _tell(w: Waves, i: Instruction, how: str, at, size: int, active, values=()) -> None:
    """Tells the watches of an access."""
    for each in () if i.form.startswith("SCRATCH") else w.shared.watches:
        told = each.local if i.form.startswith("DS") or how == "direct" else each.memory
        told(w, i, how, at, size, active, values)


def loaded(w: Waves, i: Instruction, find: Callable, size: int) -> list[np.ndarray]:
    """Registers [waves, 64] of a load; 0 outside of a buffer."""
    memory, at, active, inside = find(w)
    _tell(w, i, "read", at, size, active)
    values = gather(memory, at, size)
    return values if inside is None else [np.where(inside, value, U32(0)) for value in values]


def load(i: Instruction, kernel: Kernel) -> Run:
    if i.form.startswith("MUBUF") and i.get("lds"):
        return _load_to_lds(i, kernel)
    size, finds, row = size_of(i), accesses(i, kernel), row_of(i, kernel, "vdst", "vdata")
    return lambda w: receive(
        w, i, row, [value for find in finds for value in loaded(w, i, find, size)]
    )


def store(i: Instruction, kernel: Kernel) -> Run:
    size, finds = size_of(i), accesses(i, kernel)
    rows = [row_of(i, kernel, first, "data", "vdata") for first in ("data0", "data1")]

    def run(w: Waves) -> None:
        for find, row in zip(finds, rows):
            memory, at, active, _ = find(w)
            values = _stored(w, i, row, size, active)
            _tell(w, i, "write", at, size, active, values)
            scatter(memory, chosen(at, active), values, size)
        w.issue(i)

    return run


def _check_lds(w: Waves, at: np.ndarray, size: int) -> None:
    """Raises Fault where active lanes access LDS outside of their workgroup's."""
    outside = ((at < 0) | (at > w.shared.lds_size - size)) & w.exec
    if outside.any():
        first = np.broadcast_to(at, w.exec.shape)[outside][:4]
        raise Fault(f"{size} bytes at LDS offset {first} of {w.shared.lds_size}")


def _load_to_lds(i: Instruction, kernel: Kernel) -> Run:
    """A load whose data go to LDS at M0 + offset + lane · size, no register in between."""
    size, (find,) = size_of(i), accesses(i, kernel)
    step = i.get("offset") if i.form.startswith("MUBUF") else signed(i.get("offset"), 13)
    lane = np.arange(LANES) * size

    def run(w: Waves) -> None:
        values = loaded(w, i, find, size)
        target = w.scalar[M0].astype(I64)[:, None] + step + lane
        _check_lds(w, target, size)
        target = target + w.lds_at
        values = [chosen(value, w.active) for value in values]
        _tell(w, i, "direct", target, size, w.active, values)
        places = chosen(target, w.active)
        w.issue(i, lambda: scatter(w.shared.lds, places, values, size))

    return run


def _bf16_sum(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    halves = zip(old.view(np.uint16).reshape(-1, 2).T, new.view(np.uint16).reshape(-1, 2).T)
    sums = [floats.to_bf16(floats.from_bf16(a) + floats.from_bf16(b)) for a, b in halves]
    return sums[0] | sums[1] << 16


def _f16_sum(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return (old.view(np.float16) + new.view(np.float16)).view(U32)


def _as(kinds: dict[int, type], function: Callable) -> Callable:
    """A function of the numbers, of a type by their bytes, whose bits unsigned ones hold."""
    return lambda *bits: function(*(x.view(kinds[x.itemsize]) for x in bits)).view(bits[0].dtype)


_SIGNED, _REAL = {4: np.int32, 8: np.int64}, {4: F32, 8: np.float64}
_ATOMIC = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "umin": np.minimum,
    "umax": np.maximum,
    "smin": _as(_SIGNED, np.minimum),
    "smax": _as(_SIGNED, np.maximum),
    "swap": lambda old, new: new,
    "add_f32": _as(_REAL, np.add),
    "add_f64": _as(_REAL, np.add),
    "pk_add_bf16": _bf16_sum,
    "pk_add_f16": _f16_sum,
}
"""(old value, data) to new value, by the operation of a global atomic."""


def _joined(w: Waves, row: int, words: int, active: np.ndarray) -> np.ndarray:
    """One or two registers as flat unsigned numbers of the active lanes."""
    low = w.vector[row][active]
    return low if words == 1 else low.astype(U64) | w.vector[row + 1][active].astype(U64) << 32


def atomic(i: Instruction, kernel: Kernel, operation: str) -> Run:
    """A read-modify-write of each lane in turn, in global memory or LDS."""
    function, size, (find,) = _ATOMIC.get(operation), size_of(i), accesses(i, kernel)
    if function is None and operation != "cmpswap":
        raise NotImplementedError(i.name)
    words, row = size // 4, row_of(i, kernel, "vdst", "vdata")
    data = row_of(i, kernel, "data0", "data", "vdata")
    returns = "_rtn" in i.name or bool(i.get("sc0"))

    def run(w: Waves) -> None:
        memory, at, active, _ = find(w)
        active = w.exec if active is None else active
        places, values = at[active], _joined(w, data, words, active)
        if (places % size).any():
            raise Fault(f"atomic of {size} bytes at a place that they do not divide")
        _tell(w, i, "atomic", at, size, active)
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
        w.issue(i, deliver, registers)

    return run


def _global_atomic(i: Instruction, kernel: Kernel) -> Run:
    return atomic(i, kernel, i.name.split("_atomic_")[1].removesuffix("_x2"))


MEMORY: Kinds = [
    (r"(global|buffer)_atomic_\w+", _global_atomic),
    (r"global_load_lds_\w+", _load_to_lds),
    (r"(global|buffer|scratch)_load_\w+", load),
    (r"(global|buffer|scratch)_store_\w+", store),
]
