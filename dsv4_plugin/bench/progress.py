"""How a benchmark shows itself: a bar for the sweep and one for the point on stderr, a line a
finished point on stdout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Table

from .ablation import Worth
from .client import Load
from .goodput import spelled
from .sweep import Progress


@contextmanager
def shown(points: int | None) -> Iterator[Progress]:
    """A Progress that shows `points` points, None where their number is not known; drawn only on a
    terminal."""
    terminal, out = Console(stderr=True), Console(soft_wrap=True, highlight=False)
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=terminal,
        disable=not terminal.is_terminal,
    ) as bars:
        whole = bars.add_task("points", total=points)
        part = bars.add_task("starting", total=None)

        def point(load: Load, what: str) -> None:
            bars.reset(
                part, description=f"{load.name}{f', {what}' if what else ''}", total=load.prompts
            )

        def finished(load: Load, result: Mapping[str, Any], before: bool) -> None:
            bars.advance(whole)
            out.print(escape(line(load.name, result, before)))
            for warning in result["warnings"]:
                terminal.print(
                    f"[yellow]warning:[/] {escape(f'{load.name}: {warning}')}", soft_wrap=True
                )

        yield Progress(
            starting=lambda log: bars.reset(
                part, description=f"the server is starting, its log is {log}", total=None
            ),
            point=point,
            requests=lambda done: bars.update(part, completed=done),
            finished=finished,
        )


def line(name: str, result: Mapping[str, Any], before: bool) -> str:
    """One point in words."""
    unit = "tokens/s" if str(result.get("hw")).lower() == "cpu" else "tokens/s/GPU"
    text = (
        f"{name}: {result['tput_per_gpu']:.1f} {unit}, {result['median_intvty']:.2f}"
        f" tokens/s/user, TTFT {1000 * result['median_ttft']:.0f} ms, TPOT"
        f" {1000 * result['median_tpot']:.2f} ms"
    )
    if result.get("accept_length"):
        text += f", {result['accept_length']:.2f} tokens a verification"
    if result.get("goodput"):
        text += f", {spelled(result['goodput'])}"
    if "request_rate" in result:
        text += f", at {result['request_rate']:.3g} requests/s"
    if result["spread"] is not None:
        text += f"; {result['repeat']} runs within {100 * result['spread']:.1f} %" + (
            ", UNSTABLE" if result["unstable"] else ""
        )
    return text + (" (measured before)" if before else "")


def print_ranking(worths: Sequence[Worth], noise: float) -> None:
    """Prints what each operator is worth."""
    table = Table(
        "operator",
        "implementation",
        "throughput without it",
        "throughput gain",
        "TPOT saved",
        "",
        title=(
            f"what each operator is worth; the baseline differs from itself by {100 * noise:.1f} %"
        ),
    )
    for worth in worths:
        table.add_row(
            worth.operator,
            worth.implementation,
            f"{worth.tput_per_gpu:.1f}",
            f"{100 * worth.throughput_gain:+.1f} %",
            f"{1000 * worth.tpot_saved:+.2f} ms",
            "" if worth.certain else "within the noise",
        )
    Console().print(table)
