"""What a loop asks of memory, read from its instructions: local memory's bytes, and bytes of global
memory that are on their way at once.

A kernel that loads a block, waits, and loads the next has few bytes in flight, whatever its issue
cycles say; bandwidth times latency must be in flight on the chip to use its memory (on gfx950 about
8 TB/s · 0.8 us / 256 units = 25 KB a unit; on sm_90 3.35 TB/s · 0.7 us / 132 = 18 KB an SM).
"""

from __future__ import annotations

import re

_LDS = re.compile(
    r"ds_(?:read|write|load|store)(2?)(?:st64)?_(?:\w*?)[bui](8|16|32|64|96|128)(?![0-9])"
)
_WORDS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+)")
_STORE = re.compile(r"(?:global|buffer|flat)_(?:store|atomic)_")
_WAIT = re.compile(r"vmcnt\((\d+)\)")

WAVE, WARP = 64, 32


def amd_local_bytes(body: list[str]) -> int:
    """Bytes that one wave reads from and writes to local memory in a pass."""
    found = filter(None, map(_LDS.match, body))
    return sum((2 if each[1] else 1) * int(each[2]) // 8 for each in found) * WAVE


def amd_bytes_in_flight(body: list[str]) -> int:
    """The most bytes of global memory that one wave waits for at once in a pass, by its waits;
    loads of the pass before included."""
    flying: list[int] = []
    most = 0
    for line in body * 2:
        if load := _LOAD.match(line):
            kind = load[1]
            size = _WORDS.get(kind, 2 if "short" in kind or "16" in kind else 1)
            flying.append(size * WAVE)
        elif _STORE.match(line):
            flying.append(0)  # the same counter
        elif line.startswith("s_waitcnt") and (wait := _WAIT.search(line)):
            count = int(wait[1])
            flying = flying[len(flying) - count :] if count else []
        most = max(most, sum(flying))
    return most


_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
_BRANCH = re.compile(r"^BRA\S*\s.*?(0x[0-9a-f]+)")
_REGISTER = re.compile(r"\bR(\d+)\b")


def sass(text: str) -> list[tuple[int, str]]:
    """(address, instruction) of the first function of cuobjdump's listing, predicates dropped."""
    listing = text.split("Function :")[1] if "Function :" in text else text
    found = map(_SASS.match, listing.splitlines())
    return [(int(each[1], 16), each[2]) for each in found if each]


def sass_macs(line: str) -> int:
    """Multiply-adds of one warp by an instruction of the tensor cores."""
    name = line.split()[0]
    if group := re.match(r"[HQI]GMMA\.(\d+)x(\d+)x(\d+)", name):  # of four warps together
        return int(group[1]) * int(group[2]) * int(group[3]) // 4
    if product := re.match(r"[HQI]MMA\.(\d+)", name):
        m, n = 16, 8
        return m * n * int(product[1][3:])
    return 0


def sass_hot_loop(code: list[tuple[int, str]]) -> list[str] | None:
    """Instructions of the innermost loop with the most products, or the longest; None without
    loops."""
    spans: dict[int, int] = {}
    for address, line in code:
        if (branch := _BRANCH.match(line)) and (to := int(branch[1], 16)) < address:
            spans[to] = address
    bodies = {
        span: [line for address, line in code if span[0] <= address <= span[1]]
        for span in spans.items()
    }
    working = {span: body for span, body in bodies.items() if any(map(sass_macs, body))} or bodies
    inner = [
        body
        for (start, end), body in working.items()
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in working)
    ]
    return max(inner, key=lambda body: (sum(map(sass_macs, body)), len(body)), default=None)


def _size(name: str) -> int:
    width = re.search(r"\.(8|U8|S8|16|U16|S16|64|96|128)(?:\.|$)", name)
    return int(width[1].lstrip("US")) // 8 if width else 4


def sass_local_bytes(body: list[str]) -> int:
    """Bytes that one warp reads from and writes to shared memory in a pass; what tensor cores read
    by themselves is not among them."""
    total = 0
    for line in body:
        name = line.split()[0]
        if name.startswith(("LDS.", "STS.")) or name in ("LDS", "STS"):
            total += _size(name)
        elif matrix := re.match(r"(?:LDSM|STSM)\S*\.M88(?:\.(\d))?", name):
            total += 4 * int(matrix[1] or 1)
    return total * WARP


def sass_bytes_in_flight(body: list[str]) -> int:
    """The most bytes of global memory that one warp has asked for and not used yet in a pass: a
    load ends where its first register is read, an asynchronous copy with the wait for its group."""
    flying: dict[int, int] = {}
    groups: list[int] = [0]
    most = 0
    for line in body * 2:
        name, _, operands = line.partition(" ")
        target, _, sources = operands.partition(",")
        stores = name.startswith(("ST", "RED", "BRA"))
        for register in map(int, _REGISTER.findall(operands if stores else sources)):
            flying = {
                first: size
                for first, size in flying.items()
                if not first <= register < first + max(1, size // WARP // 4)
            }
        if name.startswith("LDG.") and not name.startswith("LDGSTS"):
            if loaded := _REGISTER.search(target):
                flying[int(loaded[1])] = _size(name) * WARP
        elif name.startswith("LDGSTS"):
            groups[-1] += _size(name) * WARP
        elif name.startswith("LDGDEPBAR"):
            groups.append(0)
        elif name.startswith("DEPBAR") and (left := re.search(r"0x([0-9a-f]+)", operands)):
            count = int(left[1], 16)
            groups = groups[max(0, len(groups) - 1 - count) :]
        most = max(most, sum(flying.values()) + sum(groups))
    return most
