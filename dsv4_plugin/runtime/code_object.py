"""What the code object of an AMD GPU says of its kernel: the metadata that the driver reads too."""

from __future__ import annotations

FACTS = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size", "group_segment_fixed_size")


def facts(code: bytes) -> dict[str, int]:
    """Registers, spilled ones, and bytes of scratch a lane and of local memory a workgroup, of the
    first kernel in `code`, which may hold the object among other things. None of another GPU's.

    The note of an object (AMDGPU code object v5) is MessagePack: a key and its unsigned integer lie
    side by side.
    """
    found = {}
    for name in FACTS:
        key = f".{name}".encode()
        at = code.find(key)
        if at >= 0:
            found[name] = _unsigned(code[at + len(key) :])
    return found


def _unsigned(packed: bytes) -> int:
    """The integer at the start of MessagePack: itself below 128, or after its size."""
    if packed[0] < 128:
        return packed[0]
    size = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}[packed[0]]
    return int.from_bytes(packed[1 : 1 + size], "big")
