"""What ran, told by the serving process: in its log when both phases have run, in a JSON file, and
on /metrics.

The file and the gauges are refreshed at most every few seconds, off the serving thread.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from sglang.srt.runtime_context import get_parallel, get_server_args

from .. import active, device, flags
from ..ops.operator import report_rows
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
        self._publishes = get_parallel().tp_group.rank_in_group == 0
        self._phases: set[str] = set()
        self._timer: threading.Timer | None = None
        self._compiles = CompileCounter(self)
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
        """Notes that a step of `phase` has run."""
        if not self._publishes:
            return
        if not self.ready and phase not in self._phases:
            self._phases.add(phase)
            self.ready = {"prefill", "decode"} <= self._phases
            if self.ready:
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
                "compiled after ready": self._compiles.count,
            },
            report_rows(),
        )

    def publish(self) -> None:
        """Writes the report and sets the gauges. A file that cannot be written is said once and
        given up."""
        now = self.report()
        if self._series is not None:
            self._series.set(now.rows, self._compiles.count)
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


class CompileCounter:
    """Counts kernels that Triton compiles once the server is ready: each is a stall that a user
    feels."""

    def __init__(self, recorder: Recorder):
        self.count = 0
        self._recorder = recorder
        try:
            from triton import knobs
        except ImportError:
            return
        self._before = knobs.compilation.listener
        knobs.compilation.listener = self._compiled

    def _compiled(
        self, *, src: Any, metadata: dict[str, Any], cache_hit: bool, **rest: Any
    ) -> None:
        if self._recorder.ready and not cache_hit:
            self.count += 1
            logger.warning(
                "dsv4_plugin: compiled %s while serving; requests waited for it",
                metadata.get("name"),
            )
        if self._before is not None:
            self._before(src=src, metadata=metadata, cache_hit=cache_hit, **rest)


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
