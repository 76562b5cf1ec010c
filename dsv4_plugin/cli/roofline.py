"""The least time that a step can take on a GPU, by component, and the best curve that follows."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import Geometry
    from ..roofline.fit import Fit
    from ..roofline.hardware import Hardware
    from ..roofline.limit import LimitPoint
    from ..roofline.speculation import Speculation
    from ..roofline.step import Step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="pro",
        help=(
            "pro, flash, pro-0813, flash-0731, or a config.json or its directory"
            " (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--gpu", default="MI355X", help="GPU of roofline/hardware.yaml (default: %(default)s)"
    )
    parser.add_argument(
        "--layout",
        default="tp8",
        help="tp8, dp8, dp8-ep8, or dp4/8: 4 attention groups on 8 GPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=_counts,
        default=(1, 8, 32, 128, 512),
        metavar="A,B,...",
        help="requests in a decode step, prompts in a prefill step (default: 1,8,32,128,512)",
    )
    parser.add_argument(
        "--context",
        type=_counts,
        default=(8192,),
        metavar="A,B,...",
        help="tokens of each request (default: 8192)",
    )
    parser.add_argument(
        "--prefill", action="store_true", help="a prefill step instead of a decode step"
    )
    parser.add_argument(
        "--index-dtype",
        choices=("fp8", "fp4"),
        default="fp8",
        help="the indexer's cached keys (default: %(default)s)",
    )
    parser.add_argument(
        "--workload",
        type=_workload,
        default=(8192, 1024),
        metavar="IN/OUT",
        help=(
            "nominal tokens of the best possible curve; lengths are 0.8 to 1 of them "
            "(default: 8192/1024)"
        ),
    )
    parser.add_argument(
        "--accepted-length",
        type=float,
        metavar="TOKENS",
        help=(
            "draft with the model's DSpark stages, and assume that a verification gives so many"
            " tokens on average, the one after the drafts included"
        ),
    )
    parser.add_argument(
        "--what-if",
        default="",
        metavar="NAME=X,...",
        help=(
            "assume launch_us, or fractions of the peaks: bandwidth, compute, link, weights,"
            " caches, activations, prefill"
        ),
    )
    parser.add_argument(
        "--fit",
        action="store_true",
        help="also fit launch cost and efficiencies to the published curves",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _counts(text: str) -> tuple[int, ...]:
    if not all(word.isdigit() and int(word) for word in text.split(",")):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of counts above 0"
        )
    return tuple(int(word) for word in text.split(","))


def _workload(text: str) -> tuple[int, int]:
    isl, _, osl = text.partition("/")
    if not (isl.isdigit() and osl.isdigit() and int(isl) and int(osl)):
        raise argparse.ArgumentTypeError(f"{text!r} is not IN/OUT, such as 8192/1024")
    return int(isl), int(osl)


def run(arguments: argparse.Namespace) -> int:
    import json

    figures = _figures(arguments)
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        _print(figures)
    return 0


def _figures(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure that the command knows, in seconds, bytes and FLOP."""
    from ..checkpoint.released import load_geometry
    from ..roofline import assumptions, limit, weights
    from ..roofline.hardware import Hardware
    from ..roofline.layout import Layout, LayoutError
    from ..roofline.memory import USABLE, largest_batch, resident
    from ..roofline.speculation import speculation
    from ..roofline.step import decode_step, prefill_step

    geometry = load_geometry(arguments.model)
    hardware = Hardware.named(arguments.gpu)
    layout = Layout.parse(arguments.layout)
    efficiency = assumptions.parse(arguments.what_if)
    make = prefill_step if arguments.prefill else decode_step
    shapes = [(context, batch) for context in arguments.context for batch in arguments.batch]
    steps = [
        make(geometry, hardware, layout, batch, context, arguments.index_dtype).under(efficiency)
        for context, batch in shapes
    ]
    points = limit.limit_points(
        geometry,
        hardware,
        [layout],
        limit.Workload.nominal(*arguments.workload),
        efficiency=efficiency,
        index_dtype=arguments.index_dtype,
        accepted_length=arguments.accepted_length,
    )
    rounds = []
    if arguments.accepted_length is not None:
        if arguments.prefill:
            raise LayoutError("--accepted-length is of decode steps; leave out --prefill")
        rounds = [
            speculation(
                geometry,
                hardware,
                layout,
                batch,
                context,
                arguments.accepted_length,
                arguments.index_dtype,
            ).under(efficiency)
            for context, batch in shapes
        ]
    drafting = bool(rounds)
    holdings = weights.holdings(geometry)
    return {
        "model": arguments.model,
        "gpu": hardware.name,
        "gpu_source": hardware.source,
        "layout": layout.name,
        "index_dtype": arguments.index_dtype,
        "what_if": arguments.what_if,
        "assumed_launch_seconds": hardware.launch,
        "parameters": sum(holding.elements for holding in holdings if not holding.mtp),
        "mtp_parameters": sum(holding.elements for holding in holdings if holding.mtp),
        "checkpoint_bytes": sum(holding.bytes for holding in holdings),
        "bytes_by_group": weights.component_bytes(geometry),
        "resident_bytes_per_gpu": resident(geometry, layout, drafting),
        "memory_bytes": hardware.memory,
        "weights_fit": resident(geometry, layout, drafting) < USABLE * hardware.memory,
        "largest_batch": {
            str(context): largest_batch(
                geometry, hardware, layout, context, arguments.index_dtype, drafting
            )
            for context in arguments.context
        },
        "steps": [_step(step, batch) for step, (_, batch) in zip(steps, shapes)],
        "speculation": [
            _round(each, step, batch) for each, step, (_, batch) in zip(rounds, steps, shapes)
        ],
        "curve": {
            "workload": "/".join(map(str, arguments.workload)),
            "points": list(map(_limit_point, points)),
        },
        **({"fits": _fits(geometry, hardware, arguments.model)} if arguments.fit else {}),
    }


def _step(step: Step, batch: int) -> dict[str, Any]:
    return {
        "phase": "prefill" if step.prefill else "decode",
        "batch": batch,
        "context": step.context,
        "seconds": step.seconds,
        "memory_seconds": step.memory_seconds,
        "seconds_by_kind": step.by_kind(),
        "bytes": sum(component.bytes for component in step.components),
        "flops": sum(sum(component.flops.values()) for component in step.components),
        "components": [
            {
                "name": c.name,
                "kind": c.kind,
                "bytes": c.bytes,
                "flops": dict(c.flops),
                "link_bytes": c.link_bytes,
                "launches": c.launches,
                "seconds": c.seconds(step.hardware, step.efficiency),
            }
            for c in step.components
        ],
    }


def _round(found: Speculation, plain: Step, batch: int) -> dict[str, Any]:
    return {
        "batch": batch,
        "context": plain.context,
        "accepted_length": found.accepted_length,
        "verify": _step(found.verify, batch),
        "draft": _step(found.draft, batch),
        "token_seconds": found.seconds,
        "plain_token_seconds": plain.seconds,
    }


def _limit_point(point: LimitPoint) -> dict[str, Any]:
    return {
        "conc": point.concurrency,
        "intvty": point.intvty,
        "tput_per_gpu": point.tput_per_gpu,
        "tpot_seconds": point.tpot,
        "prefill_seconds": point.prefill_seconds,
        "decode_seconds": point.decode_seconds,
    }


def _fits(geometry: Geometry, hardware: Hardware, model: str) -> list[dict[str, Any]]:
    from ..report.curves import load_published
    from ..roofline.fit import fit_curve
    from ..roofline.layout import LayoutError

    published = load_published()
    if hardware.name != published.curves[0].hardware or model != "pro":
        raise LayoutError(
            f"--fit: the published curves are of pro on {published.curves[0].hardware}, "
            f"not of {model} on {hardware.name}"
        )
    return [_fit(fit_curve(curve, geometry, hardware)) for curve in published.curves]


def _fit(fit: Fit) -> dict[str, Any]:
    return {
        "date": fit.curve.date,
        "launch_seconds": fit.launch,
        "decode_efficiency": fit.decode_efficiency,
        "prefill_efficiency": fit.prefill_efficiency if fit.prefill_resolved else None,
        "worst_error": fit.worst_error,
        "points": [
            {
                "conc": each.point.concurrency,
                "layout": each.point.layout,
                "fraction_of_limit": each.fraction,
                "fitted": each.fitted,
                "shares": each.shares,
            }
            for each in fit.points
        ],
    }


def _print(figures: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(_heading(figures), highlight=False, soft_wrap=True)
    for title, columns, rows in _tables(figures):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _heading(figures: dict[str, Any]) -> str:
    text = (
        f"{figures['model']} on {figures['layout']} of {figures['gpu']}:"
        f" {figures['parameters'] / 1e9:.1f} B parameters (+{figures['mtp_parameters'] / 1e9:.1f} B"
        f" MTP), {figures['resident_bytes_per_gpu'] / 1e9:.1f} GB of weights per GPU,"
        f" {figures['assumed_launch_seconds'] * 1e6:g} µs assumed per dependent kernel"
    )
    if figures["what_if"]:
        text += f"; what if {figures['what_if']}"
    if not figures["weights_fit"]:
        text += (
            f"\nThe weights do not fit: {figures['gpu']} has"
            f" {figures['memory_bytes'] / 1e9:.0f} GB, of which a server may use 90 %. The figures"
            " below are of a machine that does not exist; take more GPUs."
        )
    return text


def _tables(figures: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of everything that is printed."""
    from ..report.page import number

    steps, last, curve = figures["steps"], figures["steps"][-1], figures["curve"]
    kinds = list(last["seconds_by_kind"])
    yield (
        f"Lower bound of one {last['phase']} step, ms",
        ["batch", "context", *kinds, "total", "memory"],
        [
            [
                str(s["batch"]),
                str(s["context"]),
                *(_ms(s["seconds_by_kind"][kind]) for kind in kinds),
                _ms(s["seconds"]),
                _ms(s["memory_seconds"]),
            ]
            for s in steps
        ],
    )
    yield (
        f"Components at batch {last['batch']}, context {last['context']}, per GPU",
        ["component", "kind", "MB", "GFLOP", "MB sent", "kernels", "ms", "share"],
        [
            [
                c["name"],
                c["kind"],
                number(c["bytes"] / 1e6),
                number(sum(c["flops"].values()) / 1e9),
                number(c["link_bytes"] / 1e6),
                str(c["launches"]),
                _ms(c["seconds"], 3),
                f"{100 * c['seconds'] / last['seconds']:.1f} %",
            ]
            for c in last["components"]
        ],
    )
    if rounds := figures["speculation"]:
        yield (
            f"With the draft, {rounds[0]['accepted_length']:g} tokens a verification, ms",
            ["batch", "context", "verify", "draft", "a token", "without", "gain"],
            [
                [
                    str(r["batch"]),
                    str(r["context"]),
                    _ms(r["verify"]["seconds"]),
                    _ms(r["draft"]["seconds"]),
                    _ms(r["token_seconds"]),
                    _ms(r["plain_token_seconds"]),
                    f"{r['plain_token_seconds'] / r['token_seconds']:.2f} ×",
                ]
                for r in rounds
            ],
        )
    if curve["points"]:
        yield (
            f"Best possible curve, {curve['workload']} tokens in/out",
            ["concurrency", "tokens/s/user", "tokens/s/GPU", "TPOT ms"],
            [
                [
                    str(p["conc"]),
                    f"{p['intvty']:.1f}",
                    f"{p['tput_per_gpu']:,.0f}",
                    _ms(p["tpot_seconds"]),
                ]
                for p in curve["points"]
            ],
        )
    if "fits" in figures:
        yield (
            "What the published curves imply",
            ["date", "µs per kernel", "decode efficiency", "prefill efficiency", "worst error"],
            [
                [
                    f["date"],
                    f"{1e6 * f['launch_seconds']:.1f}",
                    f"{100 * f['decode_efficiency']:.1f} %",
                    (
                        "not resolved"
                        if f["prefill_efficiency"] is None
                        else f"{100 * f['prefill_efficiency']:.1f} %"
                    ),
                    f"{100 * f['worst_error']:.0f} %",
                ]
                for f in figures["fits"]
            ],
        )


def _ms(seconds: float, digits: int = 2) -> str:
    return f"{1e3 * seconds:.{digits}f}"
