"""Measure a server with SGLang's own benchmark client: throughput and latency over concurrency,
with resume.

Give the address of a running server, a recipe whose server is started for the measurement, or both:
then the recipe names the workload and the concurrencies. Defaults are InferenceX's: 8192 tokens in,
1024 out, lengths from 0.8 to 1 of that, 10 prompts and 2 warm-ups a user, answers never cut short.
Results are for `dsv4 report`.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bench.deployment import Launch, Running, Setup
    from ..recipe.recipe import Arm, Recipe

CONCURRENCY = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help="address of a running server, such as http://127.0.0.1:30000",
    )
    what.add_argument("--recipe", help="name of a recipe, or the path of a .yaml file")
    what.add_argument("--arm", help="one of its arms (default: every arm that this version serves)")
    what.add_argument("--model-path", help="serve this checkpoint instead of the recipe's")
    what.add_argument(
        "--serve",
        metavar="'MODEL ...'",
        help="start `dsv4 serve` with these words instead of a recipe's",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--conc",
        type=_counts,
        metavar="N,N,...",
        help="users in the closed loop (default: the arm's, or 1 to 256 by doubling)",
    )
    load.add_argument("--offline", type=int, metavar="N", help="instead: N prompts at once")
    load.add_argument(
        "--ttft-ms",
        type=float,
        help=(
            "instead: Poisson arrivals; the largest rate whose 99th percentile of the time to the"
            " first token stays within this"
        ),
    )
    load.add_argument(
        "--tpot-ms",
        type=float,
        help="and whose 99th percentile of the time per output token stays within this",
    )
    load.add_argument(
        "--rate",
        type=float,
        default=1.0,
        help="requests a second from which that search starts (default: %(default)g)",
    )
    load.add_argument(
        "--prompts",
        type=int,
        default=200,
        help="requests of each of its trials (default: %(default)s)",
    )
    load.add_argument("--isl", type=int, help="tokens in (default: the recipe's, or 8192)")
    load.add_argument("--osl", type=int, help="tokens out (default: the recipe's, or 1024)")
    load.add_argument(
        "--range-ratio",
        type=float,
        help="shortest length over longest (default: the recipe's, or 0.8)",
    )
    load.add_argument("--prompts-per-user", type=int, default=10, help="default: %(default)s")
    load.add_argument("--warmups-per-user", type=int, default=2, help="default: %(default)s")
    load.add_argument(
        "--api",
        choices=("sglang", "openai"),
        default="sglang",
        help="send token ids to /generate, or text to /v1/completions (default: %(default)s)",
    )
    load.add_argument(
        "--repeat",
        type=int,
        default=1,
        metavar="N",
        help=(
            "runs of each point; the middle one counts, and their spread is stated (default:"
            " %(default)s)"
        ),
    )
    load.add_argument(
        "--ablate",
        nargs="?",
        const="",
        metavar="OPERATOR,...",
        help=(
            "measure with one operator at a time back at its reference, and rank what each is worth"
            " (default: all that run something else)"
        ),
    )
    about = parser.add_argument_group("results")
    about.add_argument(
        "--out",
        type=Path,
        help="directory of the results (default: results/ and the recipe's or model's name)",
    )
    about.add_argument(
        "--again", action="store_true", help="measure points anew that are finished there"
    )
    about.add_argument(
        "--hw",
        help=(
            "GPU, as InferenceX names it: mi355x (default: the recipe's, or the architecture that"
            " the server reports)"
        ),
    )
    about.add_argument(
        "--label", help="name of the curve (default: date, GPU, framework, precision)"
    )
    about.add_argument("--image", help="container image of the server, for the record")
    about.add_argument(
        "--tokenizer", help="directory of the tokenizer, where the server's is not found from here"
    )
    about.add_argument(
        "--ready-minutes",
        type=float,
        default=60,
        help="how long a server that is started may take (default: %(default)g)",
    )


def _counts(text: str) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of counts above 0"
        )
    return counts


def run(arguments: argparse.Namespace) -> int:
    from ..bench.client import BenchError
    from ..bench.progress import shown

    recipe, arms = _recipe(arguments)
    _check(arguments, recipe)
    workload, out = (
        _workload(arguments, recipe),
        arguments.out or Path("results") / _name(arguments, recipe),
    )
    points = (
        None
        if arguments.ablate is not None or arguments.ttft_ms
        else sum(len(_loads(arguments, arm, workload)) for arm in arms)
    )
    with shown(points) as progress:
        setup = _setup(arguments, recipe, workload, out, progress)
        for arm in arms:
            place = out / arm.name if arm and recipe and len(recipe.arms) > 1 else out
            deployment = _deployment(arguments, setup, recipe, arm, place)
            if arguments.ablate is not None:
                _ablate(arguments, deployment, arm, workload, place)
            elif arguments.ttft_ms:
                _search(arguments, deployment, place)
            else:
                _sweep(arguments, deployment, _loads(arguments, arm, workload), place)
    if not any(out.rglob("*.json")):
        raise BenchError(f"nothing was measured into {out}")
    print(f"dsv4 bench: results in {out}; draw them with: dsv4 report {out} --out {out}/report")
    return 0


def _recipe(arguments: argparse.Namespace) -> tuple[Recipe | None, list[Arm | None]]:
    """The recipe and the arms of it that are measured; [None] without one. Raises RecipeError when
    none can be served."""
    from ..recipe.reader import find_recipe
    from ..recipe.recipe import RecipeError

    if not arguments.recipe:
        return None, [None]
    recipe = find_recipe(arguments.recipe)
    arms = [recipe.arm(arguments.arm)] if arguments.arm or arguments.url else list(recipe.arms)
    served = [arm for arm in arms if arguments.url or not arm.not_served]
    for arm in arms:
        if arm not in served:
            print(
                f"dsv4 bench: arm {arm.name} is left out: not served by this version:"
                f" {arm.not_served}"
            )
    if not served:
        raise RecipeError(f"recipe {recipe.name}: not served by this version: {arms[0].not_served}")
    return recipe, served


def _check(arguments: argparse.Namespace, recipe: Recipe | None) -> None:
    from ..bench.client import BenchError

    if not (arguments.url or recipe or arguments.serve) or (
        arguments.serve and (arguments.url or recipe)
    ):
        raise BenchError(
            "give the address of a running server, --recipe NAME, or --serve 'MODEL ...', which"
            " stands alone"
        )
    if (arguments.ttft_ms is None) != (arguments.tpot_ms is None):
        raise BenchError("--ttft-ms and --tpot-ms are bounds of one search; give both")
    if (
        sum(
            (
                arguments.conc is not None and arguments.ablate is None,
                arguments.offline is not None,
                arguments.ttft_ms is not None,
                arguments.ablate is not None,
            )
        )
        > 1
    ):
        raise BenchError(
            "--conc, --offline, --ttft-ms with --tpot-ms, and --ablate are different measurements;"
            " give one of them"
        )
    for name, value in (
        ("--repeat", arguments.repeat),
        ("--offline", arguments.offline),
        ("--prompts", arguments.prompts),
        ("--rate", arguments.rate),
    ):
        if value is not None and value <= 0:
            raise BenchError(f"{name} is {value}; it must be above 0")
    if arguments.ablate is not None and arguments.url:
        raise BenchError(
            "--ablate starts servers of its own; give --recipe or --serve without an address"
        )


def _workload(arguments: argparse.Namespace, recipe: Recipe | None):
    from ..bench.client import Workload

    given = {
        name: getattr(arguments, name)
        for name in ("isl", "osl", "range_ratio")
        if getattr(arguments, name) is not None
    }
    return Workload(
        **{**(recipe.workload if recipe else {}), **given},
        prompts_per_user=arguments.prompts_per_user,
        warmups_per_user=arguments.warmups_per_user,
        api=arguments.api,
    )


def _name(arguments: argparse.Namespace, recipe: Recipe | None) -> str:
    if recipe:
        return recipe.name
    if arguments.serve:
        return Path(arguments.serve.split()[0]).name
    from ..bench.server import describe

    return Path(describe(arguments.url, arguments.tokenizer).model).name


def _setup(
    arguments: argparse.Namespace, recipe: Recipe | None, workload: Any, out: Path, progress: Any
) -> Setup:
    from ..bench.deployment import Setup
    from ..bench.store import begun
    from .active import from_url

    given = {
        "hw": arguments.hw or (recipe.gpu.lower() if recipe else None),
        "image": arguments.image or (recipe.image if recipe else None),
        "label": arguments.label,
    }
    if arguments.ablate is not None and not arguments.label:
        given["label"] = _name(arguments, recipe)
    labels = {name: value for name, value in given.items() if value}
    return Setup(
        workload,
        {**labels, "date": begun(out)},
        from_url,
        progress,
        arguments.tokenizer,
        60 * arguments.ready_minutes,
    )


def _deployment(
    arguments: argparse.Namespace, setup: Setup, recipe: Recipe | None, arm: Arm | None, place: Path
) -> Running | Launch:
    from ..bench import deployment

    if arguments.url:
        return deployment.Running(setup, arguments.url)
    if arguments.serve:
        return deployment.of_words(setup, arguments.serve, place)
    return deployment.of_recipe(setup, recipe, arm, arguments.model_path, place)


def _loads(arguments: argparse.Namespace, arm: Arm | None, workload: Any) -> list:
    from ..bench.client import Load

    if arguments.offline is not None:
        return [Load.offline(arguments.offline)]
    return [
        Load.closed(count, workload)
        for count in arguments.conc or (arm.concurrency if arm else CONCURRENCY)
    ]


def _sweep(
    arguments: argparse.Namespace, deployment: Running | Launch, loads: list, place: Path
) -> list[dict[str, Any]]:
    """Results of the loads; one server for all of them unless its command depends on the
    concurrency."""
    from ..bench.store import Store
    from ..bench.sweep import sweep

    groups = [[load] for load in loads] if getattr(deployment, "per_point", False) else [loads]
    results = []
    for group in groups:
        concurrency = (
            group[0].concurrency
            if len(groups) > 1
            else max((load.concurrency or 1) for load in group)
        )
        store = Store(place, deployment.identity(concurrency), arguments.again)
        results += sweep(
            partial(deployment.open, concurrency),
            group,
            store,
            arguments.repeat,
            deployment.setup.progress,
        )
    return results


def _search(arguments: argparse.Namespace, deployment: Running | Launch, place: Path) -> None:
    from ..bench.client import Load
    from ..bench.slo import SLO, search
    from ..bench.store import Store

    slo = SLO(arguments.ttft_ms, arguments.tpot_ms)
    store = Store(place, deployment.identity(None), arguments.again)
    done = store.finished(slo.name(arguments.prompts), 1)
    with nullcontext() if done else deployment.open(None) as bench:
        result = done or search(bench, slo, arguments.rate, arguments.prompts, store)
    deployment.setup.progress.finished(
        Load.poisson(result["request_rate"], arguments.prompts), result, done is not None
    )


def _ablate(
    arguments: argparse.Namespace, deployment: Launch, arm: Arm | None, workload: Any, place: Path
) -> None:
    from ..active import Row
    from ..bench import ablation
    from ..bench.client import BenchError, Load
    from ..bench.progress import print_ranking
    from ..bench.store import write_json

    counts = arguments.conc or [max(arm.concurrency) if arm else CONCURRENCY[-1]]
    if len(counts) != 1:
        raise BenchError(
            f"--ablate compares servers at one concurrency; --conc gives {len(counts)}"
        )
    loads = [Load.closed(counts[0], workload)]

    def measure(operator: str | None, name: str) -> dict[str, Any]:
        changed = (
            deployment.without(operator, place / name)
            if operator
            else replace(deployment, directory=place / name)
        )
        return _sweep(arguments, changed, loads, place / name)[0]

    baseline = measure(None, "baseline")
    if baseline["active"] is None:
        raise BenchError(
            "the server wrote no report of what it ran, so its operators cannot be told; see"
            " DSV4_REPORT"
        )
    running = ablation.candidates(Row(**row) for row in baseline["active"]["rows"])
    operators = ablation.chosen([name for name in arguments.ablate.split(",") if name], running)
    worths, noise = ablation.ablate(
        lambda operator: measure(operator, f"without-{operator}" if operator else "baseline-again"),
        operators,
        running,
        baseline,
    )
    write_json(
        place / "ablation.json",
        {"noise": noise, "concurrency": counts[0], "worth": [asdict(worth) for worth in worths]},
    )
    print_ranking(worths, noise)
