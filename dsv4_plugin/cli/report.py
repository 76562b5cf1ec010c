"""Draw throughput, gains and cost of benchmark results against the published curves."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..report.curves import Curve, PublishedTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        help="result files (JSON, JSON Lines) or directories of them, in InferenceX's shape",
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help="require the published MI355X curves; alone: only those",
    )
    parser.add_argument(
        "--no-published", action="store_true", help="leave the published curves out"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="directory to write into (default: report)"
    )
    parser.add_argument(
        "--costs", type=Path, help="cost table to use instead of the shipped one (YAML)"
    )
    parser.add_argument(
        "--levels",
        type=_levels,
        default=(),
        metavar="A,B,...",
        help="tokens/s/user of the matched-interactivity table",
    )
    parser.add_argument(
        "--roofline",
        action="store_true",
        help=(
            "draw the hardware's limit, the fraction of it that each point reaches, and what holds"
            " it back"
        ),
    )
    parser.add_argument(
        "--model",
        help=(
            "model of the limit: pro, flash or a config.json (default: the one that the results"
            " name)"
        ),
    )
    parser.add_argument("--gpu", help="GPU of the limit (default: the one that the results name)")


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of numbers"
        ) from None
    if min(levels) <= 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} holds {min(levels):g}; tokens per second per user are above 0"
        )
    return levels


def run(arguments: argparse.Namespace) -> int:
    from ..report.cost import SHIPPED, CostTable
    from ..report.document import Report
    from ..roofline.distance import distance

    costs = CostTable.load(arguments.costs or SHIPPED)
    curves, published = _curves(arguments)
    far = distance(curves, arguments.model, arguments.gpu) if arguments.roofline else None
    report = Report.of(
        curves,
        published,
        costs,
        arguments.levels,
        far.limit if far else None,
        [far.section()] if far else [],
    )
    for path in report.write(arguments.out):
        print(path)
    return 0


def _curves(arguments: argparse.Namespace) -> tuple[list[Curve], PublishedTable | None]:
    """The curves to draw, and the published table if its curves are among them."""
    from ..report.curves import ResultError, load_published, load_results

    if arguments.published and arguments.no_published:
        raise ResultError("--published and --no-published exclude each other; give one")
    if not arguments.results and not arguments.published:
        raise ResultError(
            "give result files or directories, or --published for the shipped tables alone"
        )
    own = []
    if arguments.results:
        own, passed_over = load_results(arguments.results)
        for path in passed_over:
            print(f"dsv4 report: {path} holds no result, passed over", file=sys.stderr)
    workloads = sorted({curve.workload for curve in own})
    if len(workloads) > 1:
        raise ResultError(
            f"results of different workloads ({', '.join(workloads)} tokens in/out) cannot share a"
            " figure; make one report for each"
        )
    if arguments.no_published:
        return own, None
    published = load_published()
    workload = published.curves[0].workload
    if own and workloads != [workload]:
        if arguments.published:
            raise ResultError(
                f"the published curves are of {workload} tokens in/out, these results of"
                f" {workloads[0]}; leave --published out or measure that workload"
            )
        print(
            f"dsv4 report: the published curves are of {workload} tokens in/out, these results of"
            f" {workloads[0]}: not drawn together",
            file=sys.stderr,
        )
        return own, None
    return [*published.curves, *own], published
