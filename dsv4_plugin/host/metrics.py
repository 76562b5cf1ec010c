"""What ran, told by the serving process: in its log when both phases have run, in a JSON file, and
on /metrics.

The file and the gauges are refreshed at most every few seconds, off the serving thread.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_parallel, get_server_args

from .. import active, device, flags
from ..ops.operator import report_rows
from ..runtime import kernel_cache
from .timeline import TIMELINE
from .version import installed

logger = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds from a step to the refresh that shows it."""
PLACE = ("operator", "phase", "layers", "rows")


class Recorder:
    """Counts steps of one model and publishes what they ran. Only the first rank of a server
    publishes."""

    def __init__(self):
        args = get_server_args()
        self.path = Path(flags.read("DSV4_REPORT") or active.default_path(args.port))
        self.ready = False
        groups = get_parallel()
        self._publishes = groups.tp_group.rank_in_group == 0 == groups.pp_rank
        self._phases: set[str] = set()
        self._timer: threading.Timer | None = None
        self._kernels = KernelCounter(self)
        self._series = Series() if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None
        self._facts = {
            "model": args.model_path,
            "port": args.port,
            "pid": os.getpid(),
            "device": device.arch(),
            "sglang": installed(),
            "torch": device.package_version("torch"),
            "triton": device.package_version("triton"),
            "flags": (
                " ".join(
                    f"{flag.name}={flags.read(flag.name)}"
                    for flag in flags.FLAGS
                    if flags.setting(flag.name).source != "default" and flag.name != flags.ADOPTED
                )
                or "none"
            ),
        }

    def step(self, phase: str) -> None:
        """Notes that a step has run, which reads a prompt ("prefill") or not ("decode")."""
        if not self._publishes:
            return
        if not self.ready and phase not in self._phases:
            self._phases.add(phase)
            self.ready = {"prefill", "decode"} <= self._phases
            if self.ready:
                TIMELINE.end("caches, graphs, first answer", last=True)
                logger.info("dsv4_plugin: start-up: %s", TIMELINE.text())
                logger.info(
                    "dsv4_plugin: what runs, after the first prefill and decode\n%s",
                    active.text(self.report()),
                )
                self.publish()
        if self._timer is None:
            self._timer = threading.Timer(INTERVAL, self._refresh)
            self._timer.daemon = True
            self._timer.start()

    def report(self) -> active.ActiveReport:
        """The report of this moment."""
        return active.ActiveReport(
            {
                **self._facts,
                "written": time.strftime("%Y-%m-%d %H:%M:%S"),
                **self._kernels.facts(),
                "start-up, seconds": dict(TIMELINE.seconds),
            },
            report_rows(),
        )

    def publish(self) -> None:
        """Writes the report and sets the gauges. A file that cannot be written is said once and
        given up."""
        now = self.report()
        if self._series is not None:
            self._series.set(now.rows, len(self._kernels.late))
        try:
            if self._publishes:
                now.write(self.path)
        except OSError as error:
            logger.error(
                "dsv4_plugin: the report of what ran cannot be written to %s: %s; set DSV4_REPORT"
                " to a path that can",
                self.path,
                error,
            )
            self._publishes = False

    def _refresh(self) -> None:
        self._timer = None
        self.publish()


class KernelCounter:
    """Counts the kernels that Triton loads and compiles. One compiled once the server is ready is a
    stall that a user feels."""

    def __init__(self, recorder: Recorder):
        self.loaded = 0
        self.compiled = 0
        self.seconds = 0.0
        """Of all compilations."""
        self.late: list[str] = []
        """Kernels compiled while serving, with their seconds."""
        self._recorder = recorder
        try:
            from triton import knobs
        except ImportError:
            return
        self._before = knobs.compilation.listener
        knobs.compilation.listener = self._told

    def facts(self) -> dict[str, Any]:
        """What the report says of kernels."""
        facts: dict[str, Any] = {}
        if self.loaded or self.compiled:
            facts["kernels"] = {
                "built ahead": _built_ahead(),
                "loaded": self.loaded,
                "compiled": self.compiled,
                "seconds of compiling": round(self.seconds, 1),
            }
        facts["compiled after ready"] = len(self.late)
        if self.late and flags.enabled("DSV4_STRICT"):
            facts["a fault of dsv4_plugin"] = (
                f"it did not know ahead that this server needs {', '.join(self.late)}; please"
                " report it"
            )
        return facts

    def _told(
        self,
        *,
        src: Any,
        metadata: dict[str, Any],
        times: Any,
        cache_hit: bool,
        **rest: Any,
    ) -> None:
        if cache_hit:
            self.loaded += 1
        else:
            self.compiled += 1
            seconds = times.total / 1e6  # Triton counts microseconds
            self.seconds += seconds
            if self._recorder.ready:
                self.late.append(f"{metadata.get('name')} ({seconds:.1f} s)")
                logger.warning(
                    "dsv4_plugin: compiled %s in %.1f s while serving; requests waited for it: %s",
                    metadata.get("name"),
                    seconds,
                    getattr(src, "signature", ""),
                )
        if self._before is not None:
            self._before(src=src, metadata=metadata, times=times, cache_hit=cache_hit, **rest)


@functools.cache
def _built_ahead() -> int:
    """Kernels of `dsv4 build` for this server, in the cache that it uses."""
    args = get_server_args()
    return kernel_cache.built_ahead(args.model_path, device.arch(), args.tp_size, args.ep_size)


class Series:
    """The Prometheus series, in the host's multi-process registry."""

    def __init__(self):
        # prometheus_client chooses its multi-process mode when it is imported, which must follow
        # the host's set-up.
        from prometheus_client import Counter, Gauge

        self._path = Gauge(
            "dsv4_path_info",
            "1 for each operator, phase, kind of layer and rows that ran, by implementation",
            (*PLACE, "implementation"),
            multiprocess_mode="mostrecent",
        )
        self._calls = Counter(
            "dsv4_calls",
            "Calls of an operator's implementation",
            ("operator", "phase", "layers", "implementation"),
        )
        self._fallback = Counter(
            "dsv4_fallback",
            "Calls that another implementation served because one that this machine offers refused "
            "their arguments or does not compile",
            ("operator", "reason"),
        )
        self._compiles = Counter("dsv4_compile_after_ready", "Kernels compiled while serving")
        self._paths: set[tuple] = set()
        self._last: dict[tuple, int] = {}

    def set(self, rows: list[active.Row], compiles: int) -> None:
        """Brings the series up to `rows` and the number of kernels compiled; only what changed is
        touched."""
        totals: dict[tuple, int] = {(self._compiles,): compiles}
        for row in rows:
            place = row.operator, row.phase, row.layer_kind
            path = *place, row.rows, row.implementation
            if path not in self._paths:
                self._paths.add(path)
                self._path.labels(*path).set(1)
            _count(totals, row.calls, self._calls, *place, row.implementation)
            if row.fallback:
                reason = "; ".join(f"{name}: {why}" for name, why in row.rejected.items())
                _count(totals, row.calls, self._fallback, row.operator, reason)
        for key, total in totals.items():
            grown = total - self._last.get(key, 0)
            if grown > 0:
                counter, *labels = key
                (counter.labels(*labels) if labels else counter).inc(grown)
            self._last[key] = total


def _count(totals: dict[tuple, int], calls: int, *key: Any) -> None:
    totals[key] = totals.get(key, 0) + calls
