"""Reads an AMDGPU code object: code, kernel descriptors, arguments and source lines (LLVM's
"User Guide for AMDGPU Backend")."""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import msgpack
from elftools.common.exceptions import DWARFError, ELFError
from elftools.elf.elffile import ELFFile

ARCHS = ("gfx942", "gfx950")
"""GPUs whose code is known here."""
_BROKEN = (
    *(ELFError, DWARFError, struct.error, KeyError, IndexError, AttributeError, TypeError),
    *(ValueError, AssertionError, msgpack.UnpackException),
)
"""What pyelftools and msgpack raise at bytes that are cut off or overwritten."""


class Unreadable(Exception):
    """Bytes that are no code object of ARCHS; the message says what they are and the way out."""


@dataclass(frozen=True)
class Argument:
    """Where a kernel argument lies in the kernarg segment, in bytes."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Kernel:
    """A kernel and what its descriptor asks the hardware to set up. Sizes are in bytes."""

    name: str
    arch: str
    code: bytes = field(repr=False)
    address: int
    """Of the first byte of `code`."""
    entry: int
    kernarg_size: int = 0
    arguments: tuple[Argument, ...] = ()
    lds: int = 0
    """Static LDS; what a launch adds comes on top."""
    scratch: int = 0
    """Of one lane."""
    registers: int = 512
    """Vector registers, accumulation registers included."""
    accumulators_at: int = 256
    """Row of the first accumulation register."""
    user_sgprs: int = 0
    user: tuple[tuple[str, int], ...] = ()
    """Name and size of what lies in the user SGPRs, in order."""
    preload: int = 0
    """Words of the kernarg segment that come in user SGPRs."""
    preload_offset: int = 0
    workgroup_id: tuple[bool, bool, bool] = (False, False, False)
    mode: int = 0xF0
    """The MODE register at the start; 0xF0 keeps subnormals of every width."""
    metadata: dict = field(repr=False, default_factory=dict)
    lines: tuple[tuple[int, str], ...] = field(repr=False, default=())
    """(address, "file:line"), addresses rising."""

    def line(self, address: int) -> str:
        """ "file:line" of an instruction, "?" when the code object does not say."""
        at = bisect_right(self.lines, (address, "\uffff"))
        return self.lines[at - 1][1] if at else "?"


_USER = (
    "private_segment_buffer dispatch_ptr queue_ptr kernarg_segment_ptr dispatch_id"
    " flat_scratch_init private_segment_size"
).split()
_USER_SGPRS = (4, 2, 2, 2, 2, 2, 1)
"""Names and sizes by the bits of kernel_code_properties."""


def _lines(elf: ELFFile) -> tuple[tuple[int, str], ...]:
    """Rows of the DWARF line programs."""
    if not elf.has_dwarf_info():
        return ()
    dwarf, rows = elf.get_dwarf_info(), []
    for unit in dwarf.iter_CUs():
        program = dwarf.line_program_for_CU(unit)
        first = 0 if program.header.version >= 5 else 1
        for entry in program.get_entries():
            if entry.state and not entry.state.end_sequence:
                name = program["file_entry"][entry.state.file - first].name.decode()
                rows.append((entry.state.address, f"{PurePosixPath(name).name}:{entry.state.line}"))
    return tuple(sorted(rows))


def _kernel(about: dict, arch: str, elf: ELFFile, lines: tuple) -> Kernel:
    """The kernel that one entry of the metadata describes."""
    text = elf.get_section_by_name(".text")
    symbol = elf.get_section_by_name(".dynsym").get_symbol_by_name(about[".symbol"])[0]
    at = symbol["st_value"]
    holder = elf.get_section(symbol["st_shndx"])
    raw = holder.data()[at - holder["sh_addr"] :][:64]
    lds, scratch, kernarg_size, entry = struct.unpack_from("<III4xq", raw)
    rsrc3, rsrc1, rsrc2, properties, preload = struct.unpack_from("<IIIHH", raw, 44)
    return Kernel(
        name=about[".name"],
        arch=arch,
        code=text.data(),
        address=text["sh_addr"],
        entry=at + entry,
        kernarg_size=kernarg_size,
        arguments=tuple(
            Argument(each[".offset"], each[".size"], each[".value_kind"])
            for each in about.get(".args", ())
        ),
        lds=lds,
        scratch=scratch,
        registers=((rsrc1 & 0x3F) + 1) * 8,
        accumulators_at=((rsrc3 & 0x3F) + 1) * 4,
        user_sgprs=rsrc2 >> 1 & 0x1F,
        user=tuple(
            (name, size)
            for bit, (name, size) in enumerate(zip(_USER, _USER_SGPRS))
            if properties >> bit & 1
        ),
        preload=preload & 0x7F,
        preload_offset=preload >> 7,
        workgroup_id=tuple(bool(rsrc2 >> bit & 1) for bit in (7, 8, 9)),
        mode=rsrc1 >> 12 & 0xFF | (rsrc1 >> 26 & 1) << 23,
        metadata=about,
        lines=lines,
    )


def _metadata(elf: ELFFile) -> dict:
    """The note that lists the kernels. Raises Unreadable."""
    note = elf.get_section_by_name(".note")
    if not note:
        raise Unreadable(
            "holds no kernel: it has no note that lists kernels; link a kernel into it"
        )
    name_size, note_size, _ = struct.unpack_from("<III", note.data())
    return msgpack.unpackb(note.data()[12 + (name_size + 3) // 4 * 4 :][:note_size])


def load(data: bytes) -> dict[str, Kernel]:
    """Kernels of a code object by name. Raises Unreadable for other bytes, damaged ones, and code
    of a GPU that is not one of ARCHS."""
    if not data.startswith(b"\x7fELF"):
        what = "is no ELF file" if data else "is empty"
        raise Unreadable(f"{what}; give a code object (.hsaco) of a kernel for {ARCHS[-1]}")
    try:
        elf = ELFFile(io.BytesIO(data))
        if elf["e_machine"] != "EM_AMDGPU":
            raise Unreadable(
                f"is code of {elf.get_machine_arch()}, not of an AMD GPU; give the kernel's .hsaco,"
                " not the program that launches it"
            )
        about = _metadata(elf)
        target, kernels = about["amdhsa.target"], about["amdhsa.kernels"]
        arch = target.rsplit("-", 1)[-1].split(":")[0]
        if arch not in ARCHS:
            raise Unreadable(f"is code of {arch}; compile the kernel for {' or '.join(ARCHS)}")
        if not kernels:
            raise Unreadable("holds no kernel: its list of kernels is empty; link a kernel into it")
        lines = _lines(elf)
        return {each[".name"]: _kernel(each, arch, elf, lines) for each in kernels}
    except _BROKEN as error:
        raise Unreadable(
            f"is cut off or damaged ({error or type(error).__name__}); copy or compile it again"
        ) from error
