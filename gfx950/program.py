"""Decodes machine code into instructions and basic blocks, by tinygrad's tables of AMD's ISA.

The only file that knows tinygrad, whose interface moves between releases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from tinygrad.renderer.amd import decode_inst
from tinygrad.runtime.autogen.amd.cdna.operands import OPERANDS

from .code_object import Kernel

VCC, M0, EXEC, OFF = 106, 124, 126, 127
"""Codes of scalar registers; OFF stands for none as a base of a global access."""
FLOATS = (0.5, -0.5, 1.0, -1.0, 2.0, -2.0, 4.0, -4.0, 0.15915494)
"""Operand codes 240 to 248."""


class Undecodable(ValueError):
    """Bytes that are no instruction."""


@cache
def _fields(form: type) -> dict[str, tuple[int, int, int, int]]:
    """(lowest bit, mask, factor, what is added) of each field of an encoding: operands become
    their code in the space where 0 to 127 are scalar and 256 to 511 vector registers."""
    return {
        name: (
            bits.lo,
            bits.mask,
            getattr(bits, "_align", 1),
            getattr(bits, "_valid_range", (0,))[0],
        )
        for name, bits in form._fields
    }


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction: `name` without encoding suffix, `form` the encoding, fields by `get`."""

    address: int
    size: int
    name: str
    form: str
    raw: Any

    def get(self, field: str) -> int:
        """A field of the encoding as a number, 0 when the encoding has none of that name."""
        found = _fields(type(self.raw)).get(field)
        if found is None:
            return 0
        low, mask, factor, add = found
        return (self.raw._raw >> low & mask) * factor + add

    def bit(self, field: str, number: int) -> bool:
        """One bit of a field."""
        return bool(self.get(field) >> number & 1)

    def has(self, field: str) -> bool:
        return field in _fields(type(self.raw))

    @cached_property
    def literal(self) -> int | None:
        """The 32-bit constant behind the instruction."""
        return self.get("literal") if self.has("literal") else None

    @cached_property
    def operands(self) -> Mapping[str, int]:
        """Registers that each operand field names."""
        return {
            name: max(1, bits // 32) for name, (_, bits, _) in OPERANDS.get(self.raw.op, {}).items()
        }

    @cached_property
    def target(self) -> int | None:
        """Address that a branch goes to."""
        if not re.match(r"s_c?branch", self.name):
            return None
        return self.address + 4 + 4 * signed(self.get("simm16"), 16)

    @cached_property
    def counter(self) -> str | None:
        """Which counter it raises: "vector" memory or "local" (LDS), both in order, or "scalar"
        memory (in any order; it shares the counter of the LDS)."""
        if self.name in ("buffer_inv", "buffer_wbl2"):
            return None
        if self.form.startswith(("GLOBAL", "MUBUF", "SCRATCH", "FLAT")):
            return "vector"
        if self.form.startswith("DS"):
            return "local"
        return "scalar" if self.name.startswith(("s_load", "s_buffer_load")) else None

    def __str__(self) -> str:
        return f"{self.address:#06x}  {self.raw!r}"


def signed(value: int, bits: int) -> int:
    """The low `bits` of `value` as a signed number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


@cache
def _decoded(code: bytes) -> Any:
    return decode_inst(code, "cdna")


def _own_bytes(code: bytes) -> bytes:
    """What the decoder may look at: 16 bytes only of a scaled matrix instruction, which tinygrad
    0.14 sees in any two matrix instructions in a row, because it asks the second half alone."""
    if code[2:4] == b"\xac\xd3":
        return code
    return code[: 8 if len(code) >= 8 else 4].ljust(16, b"\0")


def decode_one(code: bytes, address: int = 0) -> Instruction:
    """The instruction that `code` (16 bytes, or what is left) begins with. Raises Undecodable."""
    try:
        raw = _decoded(_own_bytes(code))
    except (ValueError, AssertionError, KeyError) as error:
        raise Undecodable(f"{code.hex()} at {address:#x} is no instruction") from error
    name = re.sub(r"_e(32|64)$", "", raw.op.name.lower())
    return Instruction(address, raw.size(), name, type(raw).__name__, raw)


def decode(kernel: Kernel) -> dict[int, Instruction]:
    """Instructions of a kernel by address: what its entry, or the entry past the prologue that
    loads what firmware may preload, can reach. Raises Undecodable."""
    found: dict[int, Instruction] = {}
    todo = [kernel.entry, kernel.entry + 256] if kernel.preload else [kernel.entry]
    while todo:
        address = todo.pop()
        while address not in found:
            at = address - kernel.address
            if not 0 <= at < len(kernel.code):
                raise Undecodable(f"the code ends and execution goes on at {address:#x}")
            found[address] = each = decode_one(kernel.code[at : at + 16], address)
            if each.target is not None:
                todo.append(each.target)
            if each.name in ("s_endpgm", "s_branch"):
                break
            address += each.size
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Block:
    """Instructions that run one after another; `last` branches, ends or waits for other waves."""

    address: int
    body: tuple[Instruction, ...]
    last: Instruction | None
    after: int
    """Address of what follows in memory."""

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        return (*self.body, self.last) if self.last else self.body

    @property
    def following(self) -> tuple[int, ...]:
        """Addresses where execution may go on."""
        name = self.last.name if self.last else ""
        if name == "s_endpgm":
            return ()
        if name == "s_branch":
            return (self.last.target,)
        return (self.last.target, self.after) if name.startswith("s_cbranch") else (self.after,)


_ENDS = re.compile(r"s_(c?branch\w*|endpgm|barrier)$")


def blocks(instructions: Mapping[int, Instruction]) -> dict[int, Block]:
    """Basic blocks by address."""
    starts = {each.target for each in instructions.values()} - {None}
    found, body, begin = {}, [], None
    for address, each in instructions.items():
        begin = address if begin is None else begin
        after, ends = address + each.size, bool(_ENDS.match(each.name))
        if not ends:
            body.append(each)
        if ends or after in starts or after not in instructions:
            found[begin] = Block(begin, tuple(body), each if ends else None, after)
            body, begin = [], None
    return found
