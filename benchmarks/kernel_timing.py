"""Device times of a call, with caches cold and warm, and the rates of this device that a time is
held against.

Times are those of device events. Cold: before each call a buffer larger than the last-level cache
is written. A graph's replay has no launches from the CPU in it, so the difference to the plain call
is what launching costs. On a CPU, where no kernel is worth timing, the same code takes wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 512 << 20
"""More than the 256 MiB that the largest last-level cache of today holds."""
_LEAST, _MOST = 7, 50
_SECONDS = 0.25
"""Time given to each kind of measurement of a call, within the limits above."""
_SMALL = 1e-3
"""Calls shorter than this are captured in a graph; longer ones hide their launches."""


@dataclass(frozen=True)
class Spread:
    """Microseconds of a call over its repeats."""

    median: float
    low: float
    """A tenth of the repeats took less."""
    high: float
    """A tenth took more."""
    repeats: int


def spread(seconds: list[float]) -> Spread:
    """Median and tenths of some times in seconds."""
    ordered = sorted(1e6 * each for each in seconds)
    tenth = (len(ordered) - 1) / 10
    return Spread(
        statistics.median(ordered), ordered[round(tenth)], ordered[round(9 * tenth)], len(ordered)
    )


@dataclass(frozen=True)
class Peaks:
    """What this device did in this run."""

    copy: float
    """Bytes/s of a large copy, read and written both counted."""
    bf16: float
    """Operations/s of a large bf16 product."""
    fp8: float | None = None
    """The same of an e4m3 product; None where torch has none for this device."""

    def products(self, kind: str) -> float:
        """Operations/s of products of `kind`; of bf16 where FP8 could not be measured."""
        return self.fp8 if kind == "fp8" and self.fp8 else self.bf16


@dataclass(frozen=True)
class Times:
    """Times of one call; those of graphs are None where it was not captured."""

    cold: Spread
    warm: Spread
    graph_cold: Spread | None = None
    graph_warm: Spread | None = None
    no_graph: str = ""
    """Why it was not captured."""

    @property
    def best_cold(self) -> Spread:
        """Cold time without launches where that could be measured."""
        return self.graph_cold or self.cold


class Timer:
    """Times calls on one device; holds the buffer that empties its caches."""

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES):
        self.device = device
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def times(self, run: Callable[[], object], capture: bool | None = None) -> Times:
        """Times of `run`, which has run before; it is captured when it is short, or as `capture`
        says."""
        rough = min(self._once(run, cold=False) for _ in range(3))
        cold, warm = self._repeat(run, rough, cold=True), self._repeat(run, rough, cold=False)
        if self.device.type != "cuda":
            return Times(cold, warm, no_graph="no GPU")
        if not (rough <= _SMALL if capture is None else capture):
            return Times(cold, warm, no_graph="not asked for" if capture is False else "long")
        try:
            one, calls = self._captured(run, 1), max(1, min(20, int(_SMALL / rough)))
            many = self._captured(run, calls)
            return Times(
                cold,
                warm,
                self._repeat(one, rough, cold=True),
                self._repeat(many, rough * calls, cold=False, calls=calls),
            )
        except RuntimeError as failure:  # a call that waits for the device cannot be captured
            torch.cuda.synchronize()
            return Times(cold, warm, no_graph=str(failure).splitlines()[0])

    def peaks(self) -> Peaks:
        """Copy bandwidth and product rates of this device: the best of some repeats, which is what
        a bound must be."""
        bytes_, side = (4 << 30, 8192) if self.device.type == "cuda" else (1 << 26, 256)
        copy = bytes_ / self._copy_seconds(bytes_ // 2)
        a, b = (torch.randn(side, side, device=self.device).to(torch.bfloat16) for _ in range(2))
        bf16 = 2 * side**3 / self._best(lambda: a @ b)
        return Peaks(copy, bf16, self._fp8(a, b))

    def _copy_seconds(self, bytes_: int) -> float:
        source = torch.empty(bytes_, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        return self._best(lambda: target.copy_(source))

    def _fp8(self, a: torch.Tensor, b: torch.Tensor) -> float | None:
        if self.device.type != "cuda":
            return None
        one = torch.ones((), device=self.device)
        try:
            a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
            return (
                2
                * a.shape[0] ** 3
                / self._best(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16))
            )
        except (RuntimeError, ValueError):  # an architecture without FP8 products of this format
            return None

    def _best(self, run: Callable[[], object]) -> float:
        run()
        return min(self._once(run, cold=False) for _ in range(10))

    def _repeat(
        self, run: Callable[[], object], rough: float, cold: bool, calls: int = 1
    ) -> Spread:
        repeats = max(_LEAST, min(_MOST, int(_SECONDS / max(rough, 1e-6))))
        return spread([self._once(run, cold) / calls for _ in range(repeats)])

    def _captured(self, run: Callable[[], object], calls: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        graph.replay()
        return graph.replay

    def _once(self, run: Callable[[], object], cold: bool) -> float:
        """Seconds of one call. While the cache is emptied the CPU is ahead of the device: launching
        costs little then."""
        if cold:
            self._flush.fill_(0xA5)
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
