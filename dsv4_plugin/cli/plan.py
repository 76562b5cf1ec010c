"""Where the memory of a GPU goes: weights, cached tokens, the largest step; and what fits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..roofline.memory_plan import MemoryPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="pro",
        help="a released model by name, or a config.json or its directory (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu", default="MI355X", help="GPU of roofline/hardware.yaml (default: %(default)s)"
    )
    for option, default, text in (
        ("--tp", 8, "GPUs that share the model"),
        ("--ep", 1, "of these, groups that hold different experts; 1 or all"),
        ("--context", None, "tokens of the longest request (default: the model's maximum)"),
        ("--requests", None, "requests that run at once (default: 256, as SGLang's)"),
        ("--chunk", None, "tokens of the largest prefill step (default: 8192)"),
    ):
        parser.add_argument(option, type=_positive, default=default, metavar="N", help=text)
    parser.add_argument(
        "--mem-fraction",
        type=_fraction,
        default=None,
        metavar="X",
        help="share of the memory for weights and caches (default: 0.9)",
    )
    parser.add_argument(
        "--draft",
        action="store_true",
        help="count a draft: its weights and windows, doubled rings, the rows it has verified",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _positive(text: str) -> int:
    if not (text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count above 0")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


def run(arguments: argparse.Namespace) -> int:
    """0 when the plan fits, 1 when it does not."""
    import json

    from ..checkpoint.released import load_geometry
    from ..roofline.hardware import Hardware
    from ..roofline.layout import Layout
    from ..roofline.memory_plan import layouts_that_fit, memory_plan

    geometry, hardware = load_geometry(arguments.model), Hardware.named(arguments.gpu)
    context = arguments.context or geometry.max_position_embeddings
    given = {
        "requests": arguments.requests,
        "chunk": arguments.chunk,
        "fraction": arguments.mem_fraction,
    }
    plan = memory_plan(
        geometry,
        Layout(arguments.tp, 1, arguments.ep),
        hardware.memory,
        context=context,
        draft=arguments.draft,
        **{name: value for name, value in given.items() if value is not None},
    )
    lacking = plan.lacking(context)
    fitting = layouts_that_fit(plan, geometry, context) if lacking else []
    figures = {
        "model": arguments.model,
        "gpu": hardware.name,
        "layout": plan.layout.name,
        "memory_bytes": hardware.memory,
        "weight_bytes": plan.weights,
        "total_weight_bytes": plan.weight_bytes,
        "token_bytes": plan.token,
        "request_state_bytes": plan.request,
        "requests": plan.requests,
        "cached_tokens": plan.tokens,
        "context": context,
        "request_bytes": plan.request_bytes(context),
        "workspace_bytes": plan.workspace,
        "lacking": lacking,
        "layouts_that_fit": fitting,
    }
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        _print(plan, figures)
    return 1 if lacking else 0


def _print(plan: MemoryPlan, figures: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..roofline.memory_plan import gigabytes

    console = Console(width=80, highlight=False)
    console.print(
        f"{figures['model']} on {plan.layout.name} of {figures['gpu']}, bytes on each GPU of"
        f" {gigabytes(plan.memory)}"
    )
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, size in plan.weights.items():
        table.add_row(name, gigabytes(size))
    table.add_row("weights", gigabytes(plan.weight_bytes), style="bold")
    table.add_row(
        f"state of {plan.requests} requests", gigabytes(plan.request * (plan.requests + 1))
    )
    table.add_row(
        f"cache of {plan.tokens:,} tokens, {plan.token / 1e3:.2f} kB each",
        gigabytes(plan.tokens * plan.token),
    )
    for name, size in plan.workspace.items():
        table.add_row(f"step: {name}", gigabytes(size))
    console.print(table)
    context = figures["context"]
    console.print(
        f"One request of {context:,} tokens costs {gigabytes(plan.request_bytes(context))};"
        f" {plan.tokens // context:,} of them fit."
    )
    if figures["lacking"]:
        fitting = ", ".join(figures["layouts_that_fit"])
        console.print(
            f"Does not fit: {figures['lacking']}. "
            + (f"These layouts fit: {fitting}." if fitting else "No layout of up to 16 GPUs fits.")
        )
