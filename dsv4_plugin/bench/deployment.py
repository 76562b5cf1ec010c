"""What is measured: a server that runs already, or one that this program starts from a recipe or
from words of `dsv4 serve`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..active import ActiveReport
from ..device import package_version
from ..recipe.command import command, model_config, shell
from ..recipe.recipe import Arm, Recipe
from . import environment
from .client import BenchError, Workload
from .server import Server, describe, started
from .sweep import Bench, Progress
from .validity import ActiveReportReader

PLUGIN, STOCK = "sglang+dsv4", "sglang"
"""InferenceX's field framework, of a server with the plugin and of one without."""


@dataclass(frozen=True)
class Setup:
    """What every measurement of one call shares."""

    workload: Workload
    labels: Mapping[str, str]
    """Descriptive fields that the user or the recipe gave: hw, precision, image, label, date."""
    read_series: Callable[[str], ActiveReport]
    progress: Progress
    tokenizer: str | None = None
    ready_seconds: float = 3600.0

    def identity(self, **server: Any) -> dict[str, Any]:
        """What the points of one directory must share."""
        labels = {name: value for name, value in self.labels.items() if name != "date"}
        return {
            "workload": vars(self.workload),
            "labels": labels,
            "sglang": package_version("sglang"),
            "commit": environment.commit(),
            **server,
        }

    def bench(
        self, url: str, started_with: str = "", whole: Mapping[str, str] | None = None
    ) -> Bench:
        server = describe(url, self.tokenizer)
        active_report = ActiveReportReader(server.url, self.read_series)
        report = active_report.read()
        found = {
            "hw": str(
                (report.facts.get("device") if report else None)
                or server.arguments.get("device")
                or "unknown"
            ),
            "framework": (
                PLUGIN if started_with or report else STOCK if server.arguments else "unknown"
            ),
            "precision": precision(server),
        }
        return Bench(
            server,
            self.workload,
            active_report,
            {**found, **self.labels},
            started_with,
            whole,
            self.progress,
        )


@dataclass(frozen=True)
class Running:
    """A server that somebody started."""

    setup: Setup
    url: str

    @contextmanager
    def open(self, concurrency: int | None = None) -> Iterator[Bench]:
        yield self.setup.bench(self.url)

    def identity(self, concurrency: int | None = None) -> dict[str, Any]:
        bench = self.setup.bench(self.url)
        report = bench.active_report.read()
        return self.setup.identity(
            model=bench.server.model,
            server=bench.server.launch,
            flags=report.facts.get("flags") if report else None,
        )


@dataclass(frozen=True)
class Launch:
    """A server to start. `words(concurrency)` are its command; `environment` adds to that of this
    process."""

    setup: Setup
    words: Callable[[int | None], list[str]]
    environment: Mapping[str, str]
    directory: Path
    """Where its log goes."""
    per_point: bool = False
    """Whether the command depends on the concurrency, so that each point needs a server of its
    own."""
    whole: Mapping[str, str] | None = field(default=None, repr=False)
    """The whole environment, where it is not this process's with `environment` added."""

    @contextmanager
    def open(self, concurrency: int | None = None) -> Iterator[Bench]:
        words = self.words(concurrency)
        log = self.directory / (f"server-{concurrency}.log" if self.per_point else "server.log")
        self.setup.progress.starting(log)
        whole = self.whole or {**os.environ, **self.environment}
        with started(words, whole, log, self.setup.ready_seconds) as url:
            yield self.setup.bench(
                url, shell(words, self.environment).replace(" \\\n  ", " "), whole
            )

    def identity(self, concurrency: int | None = None) -> dict[str, Any]:
        return self.setup.identity(
            server=" ".join(self.words(concurrency)), environment=dict(self.environment)
        )

    def without(self, operator: str, directory: Path) -> Launch:
        """The same server with `operator` back at its reference. Raises FlagError when another
        variable insists."""
        from .ablation import without

        whole = without(operator, {**os.environ, **self.environment})
        changed = {name: value for name, value in whole.items() if os.environ.get(name) != value}
        label = f"{self.setup.labels['label']} without {operator}"
        return replace(
            self,
            setup=replace(self.setup, labels={**self.setup.labels, "label": label}),
            environment=changed,
            directory=directory,
            whole=whole,
        )


def of_recipe(setup: Setup, recipe: Recipe, arm: Arm, model: str | None, directory: Path) -> Launch:
    """The server of one arm. Raises BenchError for one of a disaggregated group, which no single
    command starts."""
    if arm.role != "server":
        raise BenchError(
            f"arm {arm.name} of recipe {recipe.name} is one of several servers that run together;"
            f" start them with dsv4 recipe run {recipe.name} and measure the router: dsv4 bench URL"
            f" --recipe {recipe.name} --arm {arm.name}"
        )
    where = (
        str(Path(model or recipe.model).resolve())
        if Path(model or recipe.model).exists()
        else model or recipe.model
    )
    per_point = any("{concurrency}" in str(value) for value in arm.arguments.values())
    return Launch(
        setup,
        lambda concurrency: command(recipe, arm, where, concurrency),
        arm.environment,
        directory,
        per_point,
    )


def of_words(setup: Setup, text: str, directory: Path) -> Launch:
    """The server of `dsv4 serve TEXT`."""
    words = shlex.split(text)
    if not words or words[0].startswith("-"):
        raise BenchError(
            f"--serve {text!r} begins with no model; give what follows `dsv4 serve`, the model"
            " first"
        )
    return Launch(setup, lambda concurrency: ["dsv4", "serve", *words], {}, directory)


def precision(server: Server) -> str:
    """The experts' dtype, which dominates bytes and arithmetic; "unknown" when the model's
    config.json is not at hand."""
    text = model_config(server.model_path)
    return str(json.loads(text).get("expert_dtype", "unknown")) if text else "unknown"
