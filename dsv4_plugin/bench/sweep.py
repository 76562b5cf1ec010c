"""A sweep: every load, as many runs of each as asked, each finished point written at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..active import ActiveReport
from . import client, environment
from .client import Load, Workload
from .result import STABLE, accept_length, inferencex, middle, spread
from .server import Server
from .store import Store
from .validity import ActiveReportReader, compiled, warnings


@dataclass
class Progress:
    """Where a sweep tells what it does; the default tells nobody."""

    starting: Callable[[Path], None] = lambda log: None
    point: Callable[[Load, str], None] = lambda load, what: None
    requests: Callable[[int], None] = lambda done: None
    finished: Callable[[Load, Mapping[str, Any], bool], None] = lambda load, result, before: None


@dataclass
class Bench:
    """One server under measurement. `labels` are InferenceX's descriptive fields: hw, precision,
    image, date, label."""

    server: Server
    workload: Workload
    active_report: ActiveReportReader
    labels: Mapping[str, Any]
    started_with: str = ""
    """The command that started the server, where this program did."""
    environment: Mapping[str, str] | None = None
    """The whole environment in which this program started it."""
    progress: Progress = field(default_factory=Progress)

    def run(self, load: Load) -> dict[str, Any]:
        """One run of `load`. One in which kernels were compiled is made a second time: warm-ups
        compile, too.

        Raises BenchError when a request failed.
        """
        run = self._run(load)
        if run["compiled"]:
            again = self._run(load)
            again["discarded"] = f"a run before it in which {run['compiled']} kernels were compiled"
            return again
        return run

    def _run(self, load: Load) -> dict[str, Any]:
        before, begun = self.active_report.read(), time.time()
        run = client.measure(
            self.server.url,
            self.server.model,
            self.server.tokenizer,
            load,
            self.workload,
            self.progress.requests,
        )
        after = self.active_report.settled(time.time())
        return {
            **run.document(),
            "begun": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun)),
            "compiled": compiled(before, after),
            "warnings": warnings(before, after, run.figures, run.asked_output_tokens),
        }

    def result(self, load: Load, runs: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """A point in InferenceX's shape: the figures of the middle run, and everything needed to
        make it again."""
        figures = [run["figures"] for run in runs]
        chosen = runs[middle(figures)]
        apart = spread(figures)
        concurrency = load.concurrency or max(1, round(chosen["figures"]["concurrency"]))
        report = self.active_report.read()
        return {
            **self.labels,
            "model": self.server.model,
            "conc": concurrency,
            "isl": self.workload.isl,
            "osl": self.workload.osl,
            **self.server.layout(),
            **inferencex(chosen["figures"], self.server.gpus),
            **accept_length(figures),
            "goodput": chosen["figures"].get("goodput"),
            "scenario": load.scenario,
            "repeat": len(runs),
            "spread": apart,
            "unstable": apart is not None and apart > STABLE,
            "warnings": list(dict.fromkeys(warning for run in runs for warning in run["warnings"])),
            **more,
            "workload": vars(self.workload),
            "command": " ".join(chosen["command"]),
            "server_command": self.started_with or self.server.launch,
            "server_arguments": self.server.safe_arguments(),
            "commit": environment.commit(),
            "versions": environment.versions(),
            "machine": environment.machine(),
            "environment": self._environment(report),
            "active": (
                None
                if report is None
                else {"facts": report.facts, "rows": [vars(row) for row in report.rows]}
            ),
            "runs": list(runs),
        }

    def _environment(self, report: ActiveReport | None) -> dict[str, str] | None:
        """The variables that the server was started with; None when they cannot be read."""
        if self.environment is not None:
            return environment.steering(self.environment)
        return (
            environment.server_environment(report.facts.get("pid")) if report is not None else None
        )


def sweep(
    open_bench: Callable[[], AbstractContextManager[Bench]],
    loads: Sequence[Load],
    store: Store,
    repeat: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Results of all loads, in order. `open_bench()` is a context that gives a Bench; it is entered
    only when a run is needed.

    Every run is kept as soon as it has ended. Raises BenchError for the first load that cannot be
    measured.
    """
    results = []
    bench: Bench | None = None
    with ExitStack() as stack:
        for load in loads:
            done = store.finished(load.name, repeat)
            if done is None:
                bench = bench or stack.enter_context(open_bench())
                result = _point(bench, load, store, repeat)
            progress.finished(load, done or result, done is not None)
            results.append(done or result)
    return results


def _point(bench: Bench, load: Load, store: Store, repeat: int) -> dict[str, Any]:
    runs = store.runs(load.name)
    while len(runs) < repeat:
        bench.progress.point(load, f"run {len(runs) + 1} of {repeat}" if repeat > 1 else "")
        runs = [*runs, bench.run(load)]
        store.keep(load.name, runs)
    result = bench.result(load, runs)
    store.finish(load.name, result)
    return result
