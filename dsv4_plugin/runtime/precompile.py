"""Kernels compiled before a server needs them, for a GPU that need not be here.

The model's own code runs on torch's meta device, which holds shapes and no numbers, in a process
that believes in the GPU; steps of a server's life go through it. Every kernel launch is compiled
into Triton's cache on disk instead of being run. So tiles, warps and constants are the choices that
a server would make, and none is written down a second time.

A server finds a kernel there by Triton's own key: its source, the compiler, the target, the types,
alignments and constants of its arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .. import device
from ..cache import (
    Caches,
    PackedIndexCache,
    PackedLatentCache,
    entries_per_page,
    index_page_bytes,
    latent_page_bytes,
)
from ..cache.layout import PAGE_TOKENS
from ..cache.step_plan import RING_ROWS, SPECULATION_RING_ROWS, StepPlan
from ..config import Geometry, Precision
from ..model import DeepseekV4
from ..model.feed_forward import FeedForward
from ..ops import operator as selection
from ..ops.sample_greedy import sample_greedy
from ..ops.step_plan import build_draft_plan, build_step_plan
from ..parallel import Parallel, layout
from . import code_object
from .languages import BuildError, Kernel, Variant, recording


@dataclass(frozen=True)
class Target:
    """A GPU as its kernels' choices and Triton's compiler see it."""

    backend: str
    arch: str | int
    """As Triton names it."""
    warp: int
    compute_units: int
    memory: int


TARGETS: dict[str, Target] = {
    "gfx950": Target("hip", "gfx950", 64, 256, 288 << 30),
    "gfx942": Target("hip", "gfx942", 64, 304, 192 << 30),
    "sm_90": Target("cuda", 90, 32, 132, 80 << 30),
}
"""By the name that `device.arch` gives."""


@dataclass(frozen=True)
class Load:
    """Sizes of a server: the tokens of its largest prefill, the requests that it decodes at once,
    the longest context, and whether the model's DSpark draft is used."""

    chunk: int = 8192
    requests: int = 256
    context: int = 1 << 20
    draft: bool = False

    @property
    def rings(self) -> dict[int, int]:
        return SPECULATION_RING_ROWS if self.draft else RING_ROWS


def steps(load: Load) -> Iterator[tuple[int, int, int]]:
    """(rows, requests, longest context) of steps that meet every kernel variant of a server: decode
    steps plan for the longest context there is, prefills for the longest one in them."""
    powers = [1 << n for n in range(load.chunk.bit_length()) if 1 << n <= load.chunk]
    for rows in powers:
        for requests in {1, min(rows, 3), min(rows, 17)}:
            yield rows, requests, max(rows, 1)
        if rows > 1:
            yield rows - 1, 1, rows - 1
            yield rows - 1, min(rows - 1, 5), load.context // 2 + 300
    context = 512
    while context <= load.context:
        yield min(2048, load.chunk), 1, context
        yield min(2048, load.chunk), 2, context - 212
        context *= 2
    for requests in _batches(load):
        yield requests, requests, load.context


def _batches(load: Load) -> Iterator[int]:
    """Requests of decode steps, as captured graphs have them."""
    for requests in range(1, load.requests + 1):
        if requests < 17 or not requests & (requests - 1) or requests % 24 == 0:
            yield requests


def share(geometry: Geometry, tp: int, ep: int) -> Parallel:
    """The share of one of `tp` processes, of which `ep` groups hold different experts; as the host
    lays them out."""
    parallel = layout(tp, ep)
    parallel.check(geometry)
    return parallel


def shortened(geometry: Geometry, draft: bool = False) -> Geometry:
    """The same model with one layer of each kind, in their order; with `draft` one stage of its
    DSpark draft, which is the first and the last, and else none."""
    kinds: dict[tuple[bool, int], int] = {}
    for layer, ratio in enumerate(geometry.compress_ratios[: geometry.num_hidden_layers]):
        kinds.setdefault((layer >= geometry.num_hash_layers, ratio), layer)
    kept = sorted(kinds.values())
    kept += [kept[-1]]  # so that every kind has a layer before it
    dspark = geometry.dspark if draft else None
    if dspark is not None:
        taps = tuple(range(len(dspark.target_layer_ids)))
        dspark = replace(dspark, stages=1, target_layer_ids=taps)
    ratios = [geometry.compress_ratios[layer] for layer in kept] + [0] * (dspark is not None)
    return replace(
        geometry,
        num_hidden_layers=len(kept),
        num_hash_layers=sum(layer < geometry.num_hash_layers for layer in kept),
        num_nextn_predict_layers=0,
        compress_ratios=tuple(ratios),
        dspark=dspark,
    )


def _numbers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def caches(geometry: Geometry, load: Load) -> Caches:
    """Caches as large as a pool of a full GPU: past 2 GiB a kernel addresses them otherwise."""
    made, pages = Caches(), 4 * load.context // PAGE_TOKENS

    def latents(ratio: int) -> PackedLatentCache:
        slots = entries_per_page(ratio)
        return PackedLatentCache(
            _numbers(pages, latent_page_bytes(slots), dtype=torch.uint8), slots
        )

    for layer, ratio in enumerate(geometry.compress_ratios):
        made.window[layer] = latents(0)
        if not ratio:
            continue
        made.compressed[layer] = latents(ratio)
        width = 2 * geometry.head_dim * (2 if ratio == 4 else 1)
        rows = load.requests * load.rings[ratio]
        made.ring[layer] = _numbers(rows, width, dtype=torch.float32)
        if ratio == 4:
            made.index[layer] = PackedIndexCache(
                _numbers(pages, index_page_bytes(), dtype=torch.uint8)
            )
            made.index_ring[layer] = _numbers(
                rows, 4 * geometry.index_head_dim, dtype=torch.float32
            )
    return made


def step_plan(
    rows: int, requests: int, context: int, load: Load, verifies: bool = False
) -> StepPlan:
    """The plan of a step, as shapes alone; one row for each request decodes, and a step that
    `verifies` drafts has as many for each."""
    decodes = rows == requests or verifies
    return build_step_plan(
        _numbers(rows),
        _numbers(rows),
        _numbers(rows),
        prefix_lens=_numbers(requests),
        seq_lens=_numbers(requests),
        slot_table=_numbers(load.requests + 1, load.context + 4, dtype=torch.int32),
        slot_row=_numbers(requests),
        full_to_window=_numbers(1 << 24),
        max_queries=-(-rows // requests),
        max_seq_len=context,
        rings=load.rings,
        static_rows=decodes,
        may_shrink=verifies,
    )


def advance(model: DeepseekV4, rows: int, requests: int, context: int, load: Load) -> None:
    """One step of `model`, which lies on the meta device, up to the tokens that it would choose."""
    plan = step_plan(rows, requests, context, load)
    made, taps = caches(model.geometry, load), [] if load.draft else None
    streams = model(_numbers(rows), plan, made, taps)
    for wanted in {requests, rows}:  # every row where a prompt's log-probabilities are asked for
        model.logits(model.collapse(streams[:wanted]))
    _choose(model, requests)
    if taps is not None:
        model.mtp.write_context(torch.cat(taps, -1), plan.position, plan.window_write, made)


def _choose(model: DeepseekV4, rows: int) -> None:
    vocab = model.geometry.vocab_size
    sample_greedy(torch.empty(rows, vocab, dtype=torch.float32, device="meta"))


def advance_with_draft(model: DeepseekV4, requests: int, load: Load) -> None:
    """A round of `model` with its draft: a block is drafted, and a step verifies it."""
    block, made = model.geometry.dspark.block_size, caches(model.geometry, load)
    ids = model.mtp.block(_numbers(requests))
    table = _numbers(load.requests + 1, load.context + 4, dtype=torch.int32)
    plan = build_draft_plan(_numbers(requests), block, table, _numbers(requests), _numbers(1 << 24))
    plan = replace(plan, static=True)  # as a captured one
    hidden = model.mtp(ids, model.embedded(ids), plan, made)
    model.mtp.propose(hidden, _numbers(requests), model.logits, sample_greedy)
    rows, taps = requests * (block + 1), []
    plan = step_plan(rows, requests, load.context, load, verifies=True)
    streams = model(_numbers(rows), plan, made, taps)
    model.logits(model.collapse(streams))
    _choose(model, rows)
    model.mtp.write_context(torch.cat(taps, -1), plan.position, plan.window_write, made)


class Driver:
    """What Triton asks of a driver before it compiles for `target`, a GPUTarget of Triton. `arch`
    stands for the device's number, the key of Triton's in-memory cache."""

    def __init__(self, arch: str, target: Any):
        self._arch, self._target = arch, target
        self.utils = SimpleNamespace(unload_module=lambda module: None)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return self._arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _believing_in(arch: str, launch: Callable[..., Any]) -> Iterator[None]:
    """Within it this process takes itself for one with that GPU, and `launch` gets what Triton
    would launch."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = TARGETS[arch]
    properties = SimpleNamespace(
        multi_processor_count=target.compute_units, total_memory=target.memory
    )
    try:
        before = driver.active
    except RuntimeError:  # no GPU, or several kinds: Triton has no default
        before = None
    driver.set_active(Driver(arch, GPUTarget(target.backend, target.arch, target.warp)))
    try:
        with (
            mock.patch.object(device, "arch", lambda: arch),
            mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)),
            mock.patch.object(torch.cuda, "get_device_properties", lambda where: properties),
            mock.patch.object(JITFunction, "run", launch),
        ):
            selection.configure()
            yield
    finally:
        driver.set_active(before)
        selection.forget()


def variant_key(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """The key by which Triton finds a compiled kernel among those of one function: types, what it
    specialises on, and compile-time constants."""
    from triton.runtime import driver
    from triton.runtime.jit import compute_cache_key

    options = kwargs | {"debug": kwargs.get("debug", kernel.debug), "instrumentation_mode": ""}
    _, keys, _, _, binder = kernel.device_caches[driver.active.get_current_device()]
    _, specialization, parsed = binder(*args, **options)
    return compute_cache_key(keys, specialization, parsed)


def _each_variant(
    geometry: Geometry,
    parallel: Parallel,
    arch: str,
    load: Load,
    meet: Callable[..., None],
    meet_other: Callable[[Variant], None] = lambda variant: None,
) -> int:
    """Calls `meet` with the number of each new kernel variant and what Triton would launch it with;
    returns how many there are. `meet_other` gets each variant of other languages."""
    seen: set[tuple[str, str]] = set()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        key = kernel.__name__, variant_key(kernel, args, kwargs)
        if key not in seen:
            seen.add(key)
            meet(len(seen) - 1, kernel, *args, grid=grid, **kwargs)

    with torch.inference_mode(), recording(meet_other), _believing_in(arch, launch):
        parts = "all" if load.draft else "backbone"
        short = shortened(geometry, load.draft)
        model = DeepseekV4(short, Precision.SERVING, parallel, "meta", parts=parts)
        for module in model.modules():
            if isinstance(module, FeedForward):
                module.prepare()
        for rows, requests, context in steps(load):
            advance(model, rows, requests, context, load)
        for requests in _batches(load) if load.draft else ():
            advance_with_draft(model, requests, load)
    return len(seen)


def count(
    geometry: Geometry, parallel: Parallel, arch: str, load: Load
) -> tuple[int, list[Variant]]:
    """(how many variants of Triton's kernels a server meets, those of other languages)."""
    others: list[Variant] = []
    meet = _each_variant(
        geometry, parallel, arch, load, lambda *args, **kwargs: None, others.append
    )
    return meet, others


def compile_share(
    geometry: Geometry,
    parallel: Parallel,
    arch: str,
    load: Load,
    worker: int = 0,
    workers: int = 1,
    done: Callable[[Kernel], None] = lambda kernel: None,
) -> int:
    """Compiles every `workers`-th kernel variant of a server into Triton's cache and hands it to
    `done`; returns how many there are in all. Those in the cache already are read only.

    Raises BuildError where a kernel does not compile.
    """
    from triton import knobs
    from triton.runtime.jit import JITFunction

    run, found = JITFunction.run, []

    def listen(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **rest: Any) -> None:
        found.append((metadata, cache_hit))

    def compile_mine(number: int, kernel: Any, *args: Any, **kwargs: Any) -> None:
        if number % workers != worker:
            return
        started = time.perf_counter()
        try:
            compiled = run(kernel, *args, warmup=True, **kwargs)
        except Exception as error:
            raise BuildError(f"{kernel.__name__} does not compile for {arch}: {error}") from error
        metadata, cached = found.pop()
        seconds = time.perf_counter() - started
        folder = folder_of(metadata["hash"])
        done(Kernel(kernel.__name__, folder, not cached, seconds, _resources(compiled)))

    with mock.patch.object(knobs.compilation, "listener", listen):
        return _each_variant(geometry, parallel, arch, load, compile_mine)


def folder_of(key: str) -> str:
    """The folder of Triton's cache that holds the kernel of `key`."""
    from triton.runtime.cache import _base32

    return _base32(key)


def _resources(compiled: Any) -> dict[str, int]:
    """Registers, spills and local memory of a compiled kernel, where its code says them."""
    code = compiled.asm.get("hsaco", b"")
    return {"local_bytes": compiled.metadata.shared} | code_object.facts(code)
