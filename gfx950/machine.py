"""Runs a kernel: sets up its waves as the dispatcher does, and schedules them."""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .code_object import Kernel
from .convert import CONVERSIONS
from .lanes import LANES_MEET
from .local import LOCAL
from .matrix import MATRIX
from .memory import MEMORY
from .operands import Run
from .program import EXEC, Block, Instruction, blocks, decode
from .scalar import SCALAR, branch_taken
from .vector import VECTOR
from .waves import LANES, U8, U32, Fault, Memory, Shared, Watch, Waves


class Unknown(NotImplementedError):
    """An instruction that is not implemented."""


class Failed(RuntimeError):
    """An instruction that could not be executed; the message has its place and source line."""


_KINDS = (*MATRIX, *CONVERSIONS, *LANES_MEET, *VECTOR, *MEMORY, *LOCAL, *SCALAR)


def compiled(i: Instruction, kernel: Kernel) -> Run:
    """An instruction as a function of the waves. Raises Unknown."""
    make = next((make for pattern, make in _KINDS if re.fullmatch(pattern, i.name)), None)
    if make is None:
        raise Unknown(str(i))
    try:
        return make(i, kernel)
    except (NotImplementedError, KeyError) as error:
        raise Unknown(f"{i}: {error!r}") from error


@dataclass
class Code:
    """A block with its instructions compiled."""

    block: Block
    run: list[Run]
    taken: Callable[[Waves], np.ndarray] | None


@dataclass
class Program:
    """A kernel ready to run. Raises program.Undecodable or Unknown."""

    kernel: Kernel
    instructions: dict[int, Instruction] = field(init=False)
    code: dict[int, Code] = field(init=False)

    def __post_init__(self):
        self.instructions = decode(self.kernel)
        self.code = {}
        for address, block in blocks(self.instructions).items():
            last = block.last.name if block.last else ""
            taken = branch_taken(block.last) if last.startswith("s_cbranch") else None
            run = [compiled(i, self.kernel) for i in block.body]
            self.code[address] = Code(block, run, taken)

    def entries(self) -> list[int]:
        """Where execution may begin: Triton's kernels have 256 bytes before their code that load
        what newer firmware preloads."""
        first = self.kernel.entry
        return [first, first + 256] if self.kernel.preload else [first]


@dataclass
class Launch:
    """What a launch took: instructions of every wave, steps of the batches, its watches and what
    they found (hazards.Finding)."""

    instructions: int = 0
    steps: int = 0
    watches: tuple[Watch, ...] = ()
    findings: list = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How a launch is run."""

    seed: int = 0
    """Of all bits that nobody set: registers, LDS, ground between buffers; and of orders."""
    together: bool = True
    """All waves in lockstep; else each on its own from barrier to barrier, in random order."""
    late: bool = False
    """Loads arrive at the wait for them, not before. Needs waves that run each on its own."""
    preloaded: bool | None = None
    """Whether firmware preloads kernel arguments; None: where the kernel asks for it."""
    at_once: int = 256
    """Waves that run at a time."""
    limit: int = 10**9
    """Instructions after which a launch is given up."""
    watches: tuple[Callable[[], Watch], ...] = ()
    """Made for each launch."""


def kernarg(
    kernel: Kernel,
    values: Sequence[int | float | bytes] | bytes,
    grid: Sequence[int] = (1, 1, 1),
    threads: Sequence[int] = (64, 1, 1),
) -> bytes:
    """The kernarg segment: `values` laid out as the metadata says, or its bytes, and the hidden
    arguments that tell of the grid. What the kernel takes beyond them is 0, as Triton's scratch
    pointers."""
    # HSA aligns the segment to 16 bytes, and LLVM reads whole words of it past the last argument
    raw = bytearray(-(-kernel.kernarg_size // 16) * 16)
    if isinstance(values, bytes):
        raw[: len(values)], values = values, ()
    hidden = {"hidden_grid_dims": 3}
    for n, axis in enumerate("xyz"):
        hidden |= {f"hidden_block_count_{axis}": grid[n], f"hidden_group_size_{axis}": threads[n]}
    known = [hidden.get(about.kind) for about in kernel.arguments]
    for about, value in zip(kernel.arguments, [*values, *known[len(values) :]]):
        if value is None:
            continue
        if isinstance(value, float):
            value = struct.pack("<f" if about.size == 4 else "<d", value)
        elif not isinstance(value, bytes):
            value = (int(value) % (1 << 8 * about.size)).to_bytes(about.size, "little")
        raw[about.offset : about.offset + about.size] = value
    return bytes(raw)


def _start(program, groups, first, threads, shared, at, preloaded, random) -> Waves:
    """All waves of `groups` (x, y, z), numbered from workgroup `first` on; registers that nobody
    set hold random bits."""
    kernel = program.kernel
    size = math.prod(threads)
    each = -(-size // LANES)
    count = len(groups) * each
    vector = random.integers(0, 2**32, (kernel.registers, count, LANES), U32)
    scalar = random.integers(0, 2**32, (128, count), U32)
    place = 0
    for name, words in kernel.user:
        if name == "kernarg_segment_ptr":
            scalar[place], scalar[place + 1] = at & 0xFFFFFFFF, at >> 32
        place += words
    if preloaded:
        raw = shared.memory.view(at + 4 * kernel.preload_offset, 4 * kernel.preload)
        scalar[place : place + kernel.preload] = raw.view(U32)[:, None]
    place = kernel.user_sgprs
    for axis in range(3):
        if kernel.workgroup_id[axis]:
            scalar[place] = np.repeat(np.array(groups, U32)[:, axis], each)
            place += 1
    thread = np.arange(each * LANES).reshape(each, LANES)
    active = np.packbits(thread < size, axis=1, bitorder="little").view(U32)  # [each, 2]
    scalar[EXEC : EXEC + 2] = np.tile(active, (len(groups), 1)).T
    x, y, _ = threads  # 10 bits each of x, y and z
    packed = thread % x | thread // x % y << 10 | thread // (x * y) << 20
    vector[0] = np.tile(packed, (len(groups), 1)).astype(U32)
    group = np.repeat(np.arange(len(groups)), each)
    stride = len(shared.lds) // len(groups)
    return Waves(
        vector=vector,
        scalar=scalar,
        scc=random.integers(0, 2, count).astype(bool),
        mode=np.full(count, kernel.mode, U32),
        ids=first * each + np.arange(count),
        slot=np.arange(count),
        group=first + group,
        lds_at=(group * stride)[:, None].astype(np.int64),
        shared=shared,
        at=program.entries()[-1 if preloaded else 0],
    )


class _Barriers:
    """Workgroups whose waves wait for each other."""

    def __init__(self, w: Waves):
        self.alive, self.arrived = Counter(w.group.tolist()), Counter()
        self.waiting: list[Waves] = []

    def come(self, w: Waves) -> list[Waves]:
        """`w` has come to a barrier; batches that may go on."""
        self.arrived.update(w.group.tolist())
        self.waiting.append(w)
        return self._resume()

    def end(self, w: Waves) -> list[Waves]:
        """`w` has ended; batches that waited for it alone."""
        self.alive.subtract(w.group.tolist())
        return self._resume()

    def _resume(self) -> list[Waves]:
        full = {g for g in self.arrived if 0 < self.arrived[g] == self.alive[g]}
        if not full:
            return []
        ready, still = [], []
        for w in self.waiting:
            goes = np.isin(w.group, list(full))
            if goes.all():
                ready.append(w)
            elif goes.any():
                ready.append(w.part(goes))
                still.append(w.part(~goes))
            else:
                still.append(w)
        self.waiting = still
        for g in full:
            del self.arrived[g]
        return ready


_FAIR = 32
"""Of so many turns one goes to the batch that has waited longest, so that waves which spin on a
lock let its holder on."""


def _run(program: Program, everyone: Waves, options: Options, random, told: Launch) -> None:
    """Runs waves to their end. In lockstep the batch at the lowest address goes first, so that
    waves that took different branches meet again."""
    count = everyone.count
    ready = [everyone]
    if not options.together:
        ready = [everyone.part(np.arange(count) == n) for n in range(count)]
    barriers, turn = _Barriers(everyone), 0
    while ready or barriers.waiting:
        if not ready:
            raise Failed(f"{program.kernel.name}: waves wait at a barrier for others that ended")
        turn += 1
        if options.together:
            chosen = ready[0].at if turn % _FAIR == 0 else min(w.at for w in ready)
            w = Waves.joined([each for each in ready if each.at == chosen])
            ready = [each for each in ready if each.at != chosen]
        else:
            w = ready.pop(random.integers(len(ready)))
        while w is not None:
            begun = w.at
            _step(program, w, told, options.limit)
            w, more = _go_on(program.code[begun], w, barriers)
            ready += more
            others = any(each.at <= w.at for each in ready) if w and options.together else ready
            if w is not None and others and (options.together or w.at < begun):
                ready.append(w)
                break


def _step(program: Program, w: Waves, told: Launch, limit: int) -> None:
    """Runs one block."""
    code, kernel, n = program.code[w.at], program.kernel, 0
    try:
        for n, run in enumerate(code.run):  # noqa: B007  n names what failed
            run(w)
    except (Fault, IndexError, ValueError, TypeError) as error:
        i = code.block.body[n]
        raise Failed(f"{kernel.line(i.address)}: {i} of {kernel.name}: {error}") from error
    size = len(code.block.instructions)
    told.instructions += size * w.count
    told.steps += size
    if told.instructions > limit:
        raise Failed(f"{kernel.name}: more than {limit} instructions")


def _go_on(code: Code, w: Waves, barriers: _Barriers) -> tuple[Waves | None, list[Waves]]:
    """Where waves go after a block: (those that may go straight on, others that are ready)."""
    block, last = code.block, code.block.last
    name = last.name if last else ""
    w.at = last.target if name == "s_branch" else block.after
    if name == "s_endpgm":
        return None, barriers.end(w)
    if name == "s_barrier":
        for each in w.shared.watches:
            each.barrier(w)
        return None, barriers.come(w)
    if code.taken is None:
        return w, []
    taken = np.broadcast_to(code.taken(w), w.count)
    for each in w.shared.watches:
        each.branch(w, last, taken)
    if taken.all():
        w.at = last.target
    elif taken.any():
        there, here = w.part(taken), w.part(~taken)
        there.at = last.target
        return None, [there, here]
    return w, []


def launch(
    program: Program,
    grid: Sequence[int],
    threads: int | Sequence[int],
    arguments: Sequence[int | float | bytes] | bytes,
    memory: Memory,
    lds: int = 0,
    options: Options | None = None,
) -> Launch:
    """Runs a grid of workgroups (x, y, z) of `threads` on `memory`. `lds`: bytes of a workgroup on
    top of the kernel's own. Raises Failed."""
    kernel, options = program.kernel, options or Options()
    if options.late and options.together:
        raise ValueError("late loads need waves that run each on its own: together=False")
    grid = (*grid, 1, 1)[:3]
    threads = (*(threads if isinstance(threads, Sequence) else (threads,)), 1, 1)[:3]
    preloaded = kernel.preload > 0 if options.preloaded is None else options.preloaded
    raw = kernarg(kernel, arguments, grid, threads).ljust(4, b"\0")
    at = memory.put(np.frombuffer(raw, U8))
    random, told = np.random.default_rng(options.seed), Launch()
    watches = tuple(make() for make in options.watches)
    every = [(x, y, z) for z, y, x in itertools.product(*(range(n) for n in grid[::-1]))]
    waves = -(-math.prod(threads) // LANES)
    batch = max(1, options.at_once // waves)
    stride = max((kernel.lds + lds + 127) // 128 * 128, 128)
    with np.errstate(all="ignore"):
        for first in range(0, len(every), batch):
            groups = every[first : first + batch]
            lanes = len(groups) * waves * LANES
            shared = Shared(
                kernel=kernel,
                memory=memory,
                lds=random.integers(0, 256, stride * len(groups), U8),
                lds_size=kernel.lds + lds,
                scratch=random.integers(0, 256, lanes * kernel.scratch // 4 * 4 + 64, U8),
                scratch_size=kernel.scratch,
                watches=watches,
                noise=random if options.late else None,
            )
            w = _start(program, groups, first, threads, shared, at, preloaded, random)
            for each in watches:
                each.begin(w)
            _run(program, w, options, random, told)
    told.watches = watches
    told.findings = [found for each in watches for found in each.findings()]
    return told
