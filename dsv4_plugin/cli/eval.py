"""Accuracy of a running server, or with --tiny of this machine's operators on a small trained
checkpoint, without a server.

URL: GSM8K, needles in long texts, recall of facts, and the difference of two servers. The exit
status is 1 when a score is below its threshold, or when the server is worse than the one of
--against by more than two standard errors of their difference. --tiny: recall by distance, loss on
unseen text and accepted drafts, in every precision and with any choice of operators, against exact
references; the exit status is 1 when a measure is below its margin.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..accuracy.gate import Outcome
    from ..accuracy.score import Score
    from ..recipe.recipe import Recipe

HUB = "hub"
HERE = "here"
SHORT_ANSWER = 8
"""Tokens in which a model that goes on with a cue has named the thing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help="address of the server, such as http://127.0.0.1:30000",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write scores with every item as JSON"
    )
    server = parser.add_argument_group("a server")
    server.add_argument(
        "--gsm8k",
        nargs="?",
        const=HUB,
        metavar="DIR",
        help=(
            "score GSM8K; DIR holds its train.jsonl and test.jsonl (default: the dataset of the"
            " Hugging Face hub)"
        ),
    )
    server.add_argument(
        "--needle",
        type=_lengths,
        metavar="N,N,...",
        help="ask for a number hidden in texts of so many tokens, such as 4k,32k",
    )
    server.add_argument(
        "--recall",
        type=_lengths,
        metavar="N,N,...",
        help=(
            "tell 24 facts and ask for each after so many tokens, such as 1k,4k,8k; through"
            " /v1/completions unless --api chat is given"
        ),
    )
    server.add_argument("--recipe", help="take task and threshold from this recipe")
    server.add_argument(
        "--against",
        metavar="URL|FILE",
        help="another server, or an earlier --out, to compare item by item",
    )
    server.add_argument(
        "--threshold", type=float, help="least score of GSM8K (default: the recipe's)"
    )
    server.add_argument("--needle-threshold", type=float, help="least share of needles found")
    server.add_argument(
        "--recall-threshold", type=float, help="least share of things recalled, at every distance"
    )
    server.add_argument(
        "--standard-errors",
        type=float,
        default=2.0,
        metavar="K",
        help="a difference of more is real (default: %(default)g)",
    )
    server.add_argument(
        "--metric",
        choices=("strict-match", "flexible-extract"),
        default="strict-match",
        help=(
            "GSM8K: the number after ####, or the last number of the answer (default: %(default)s)"
        ),
    )
    server.add_argument("--limit", type=int, help="first questions only")
    server.add_argument(
        "--needles",
        type=int,
        default=1,
        metavar="N",
        help="needles at every length and depth (default: %(default)s)",
    )
    server.add_argument(
        "--seed", type=int, default=0, help="of needles and facts (default: %(default)s)"
    )
    server.add_argument(
        "--api",
        choices=("chat", "completions"),
        help="how questions are asked (default: chat; completions for --recall)",
    )
    server.add_argument(
        "--max-tokens",
        type=int,
        help=f"longest answer (default: 4096; {SHORT_ANSWER} for --recall through completions)",
    )
    server.add_argument(
        "--concurrency", type=int, default=16, help="GSM8K questions at once (default: %(default)s)"
    )
    gate = parser.add_argument_group("this machine")
    gate.add_argument(
        "--tiny",
        nargs="?",
        const=HERE,
        metavar="DIR",
        help=(
            "evaluate the operators of this machine on the trained checkpoint in DIR (default: the"
            " one that is shipped)"
        ),
    )
    gate.add_argument(
        "--precision",
        type=_precisions,
        metavar="P,P,...",
        help=(
            "of exact, official and serving (default: DSV4_PRECISION; all; serving alone when"
            " implementations are chosen)"
        ),
    )
    gate.add_argument(
        "--profile", metavar="P", help="choose implementations as DSV4_PROFILE=P does"
    )
    gate.add_argument(
        "--operators",
        type=lambda text: text.split(","),
        action="extend",
        default=[],
        metavar="OP=IMPL,...",
        help=(
            "choose implementations as DSV4_<OP>=IMPL does, such as sparse_mla=triton; may be given"
            " again"
        ),
    )
    gate.add_argument(
        "--quick",
        action="store_true",
        help="some hundred tokens, for interpreted kernels; the intervals are wide",
    )
    gate.add_argument(
        "--json",
        nargs="?",
        type=Path,
        const=Path("-"),
        metavar="FILE",
        help="print JSON, or write it to FILE beside the table",
    )


def _precisions(text: str) -> list[str]:
    from ..config import Precision

    known = [each.value for each in Precision]
    wanted = text.split(",")
    if not set(wanted) <= set(known):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of {', '.join(known)}"
        )
    return wanted


def _lengths(text: str) -> list[int]:
    try:
        lengths = [
            int(word[:-1]) * 1024 if word.lower().endswith("k") else int(word)
            for word in text.split(",")
        ]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of lengths, such as 4k,32k"
        )
    return lengths


_OF_SERVERS = (
    "gsm8k",
    "needle",
    "recall",
    "recipe",
    "against",
    "threshold",
    "needle_threshold",
    "recall_threshold",
    "limit",
    "api",
    "max_tokens",
    "out",
)
_OF_THE_GATE = ("precision", "profile", "operators", "quick", "json")


def run(arguments: argparse.Namespace) -> int:
    from ..accuracy.score import EvalError

    if (arguments.url is None) == (arguments.tiny is None):
        raise EvalError(
            "give either the URL of a server or --tiny"
            + ("" if arguments.url is None else ", not both")
        )
    foreign, place = (
        (_OF_THE_GATE, "--tiny") if arguments.tiny is None else (_OF_SERVERS, "a server's URL")
    )
    given = [f"--{name.replace('_', '-')}" for name in foreign if getattr(arguments, name)]
    if given:
        raise EvalError(f"{given[0]} belongs to {place}; leave it out")
    return _run_server(arguments) if arguments.tiny is None else _run_gate(arguments)


def _run_server(arguments: argparse.Namespace) -> int:
    from ..accuracy.score import difference

    recipe = _recipe(arguments)
    thresholds = _thresholds(arguments, recipe)
    scores = _scores(arguments, arguments.url)
    failed = [not _judged(score, thresholds.get(score.task.split()[0])) for score in scores]
    differences = []
    for score, other in _pairs(arguments, scores):
        found = difference(score, other)
        worse = found.significant(arguments.standard_errors)
        differences.append(found)
        failed.append(worse)
        print(
            f"{found.task} against {arguments.against}: {found.mean:+.4f} ±"
            f" {found.stderr or 0:.4f}, {found.better} items better and {found.worse} worse:"
            f" {'WORSE' if worse else 'no worse'} by {arguments.standard_errors:g} standard errors"
        )
    if arguments.out:
        _write(arguments, scores, differences, thresholds)
    return 1 if any(failed) else 0


def _recipe(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe; its task is asked for unless the user named one. Raises EvalError when there is
    nothing to evaluate."""
    from ..accuracy.score import EvalError
    from ..recipe.reader import find_recipe

    recipe = find_recipe(arguments.recipe) if arguments.recipe else None
    tasks = arguments.gsm8k or arguments.needle or arguments.recall
    if recipe is not None and not tasks:
        if recipe.accuracy.get("task") != "gsm8k":
            raise EvalError(
                f"recipe {recipe.name} names no task"
                f" ({recipe.accuracy.get('none') or recipe.accuracy['task']}); give --gsm8k,"
                " --needle or --recall"
            )
        tasks = arguments.gsm8k = HUB
    if not tasks:
        raise EvalError(
            "nothing to evaluate; give --gsm8k DIR, --needle LENGTHS, --recall LENGTHS, or --recipe"
            " NAME"
        )
    for name, value in (
        ("--limit", arguments.limit),
        ("--needles", arguments.needles),
        ("--max-tokens", arguments.max_tokens),
        ("--concurrency", arguments.concurrency),
    ):
        if value is not None and value < 1:
            raise EvalError(f"{name} is {value}; it must be above 0")
    return recipe


def _thresholds(arguments: argparse.Namespace, recipe: Recipe | None) -> dict[str, float]:
    """Least score by task."""
    found = {
        "gsm8k": arguments.threshold,
        "needle": arguments.needle_threshold,
        "recall": arguments.recall_threshold,
    }
    if found["gsm8k"] is None and recipe is not None and recipe.accuracy.get("task") == "gsm8k":
        found["gsm8k"] = recipe.accuracy["threshold"]
    return {task: value for task, value in found.items() if value is not None}


def _scores(arguments: argparse.Namespace, url: str) -> list[Score]:
    from ..accuracy import gate, gsm8k, needle, recall
    from ..bench.server import model_name

    text = recall.held_out(gate.checkpoint_directory()) if arguments.recall else ""
    model, chat, scores = model_name(url), arguments.api != "completions", []
    max_tokens = arguments.max_tokens or 4096
    if arguments.gsm8k:
        data = None if arguments.gsm8k == HUB else Path(arguments.gsm8k)
        scores.append(
            gsm8k.evaluate(
                url,
                model,
                data,
                chat=chat,
                limit=arguments.limit,
                concurrency=arguments.concurrency,
                max_tokens=max_tokens,
                metric=arguments.metric,
            )
        )
    if arguments.needle:

        def say(case, answer, found):
            print(
                f"needle: {answer.prompt_tokens} tokens, depth {case.depth:g}:"
                f" {'found' if found else f'MISSED, it said {answer.text[:60]!r}'}",
                flush=True,
            )

        scores.append(
            needle.evaluate(
                needle.asker(url, model, chat, max_tokens),
                arguments.needle,
                arguments.needles,
                arguments.seed,
                say,
            )
        )
    if arguments.recall:

        def tell(trial, answer, right):
            verdict = (
                "right"
                if right
                else f"WRONG, {trial.thing} was told and it said {answer.text[:60]!r}"
            )
            print(
                f"recall: {answer.prompt_tokens} tokens, {trial.name} told {trial.distance} tokens"
                f" before: {verdict}",
                flush=True,
            )

        chat = arguments.api == "chat"
        ask = needle.asker(
            url, model, chat, arguments.max_tokens or (4096 if chat else SHORT_ANSWER)
        )
        scores += recall.evaluate(
            ask, arguments.recall, text, seed=arguments.seed, chat=chat, progress=tell
        )
    return scores


def _judged(score: Score, threshold: float | None) -> bool:
    """Prints a score and returns whether it keeps its threshold."""
    passed = threshold is None or score.mean >= threshold
    verdict = (
        "no threshold"
        if threshold is None
        else f"threshold {threshold:g}: {'passed' if passed else 'BELOW'}"
    )
    print(
        f"{score.task} ({score.metric}): {score.mean:.4f} ± {score.stderr or 0:.4f} over"
        f" {len(score.items)} items; {verdict}"
    )
    return passed


def _pairs(arguments: argparse.Namespace, scores: list[Score]) -> list[tuple[Score, Score]]:
    """Every score with the other server's of the same task."""
    from ..accuracy.score import EvalError, read_scores

    if not arguments.against:
        return []
    remote = arguments.against.startswith(("http://", "https://"))
    others = {
        score.task: score
        for score in (
            _scores(arguments, arguments.against)
            if remote
            else read_scores(Path(arguments.against))
        )
    }
    missing = [score.task for score in scores if score.task not in others]
    if missing:
        raise EvalError(
            f"{arguments.against} has no score of {', '.join(missing)}; it has {', '.join(others)}"
        )
    return [(score, others[score.task]) for score in scores]


def _write(
    arguments: argparse.Namespace,
    scores: list[Score],
    differences: list[Any],
    thresholds: dict[str, float],
) -> None:
    from dataclasses import asdict

    from ..bench import environment
    from ..bench.server import model_name
    from ..bench.store import write_json

    write_json(
        arguments.out,
        {
            "date": time.strftime("%Y-%m-%d"),
            "url": arguments.url,
            "model": model_name(arguments.url),
            "api": arguments.api or "default",
            "thresholds": thresholds,
            "scores": [score.document() for score in scores],
            "against": arguments.against,
            "differences": [asdict(each) for each in differences],
            "commit": environment.commit(),
            "versions": environment.versions(),
        },
    )


def _run_gate(arguments: argparse.Namespace) -> int:
    from .. import flags
    from ..accuracy.eval_set import FULL, QUICK
    from ..accuracy.gate import checkpoint_directory, chosen, run_gate, settings
    from ..host import kernels  # noqa: F401  all operators' implementations, the values of flags
    from ..runtime.verify import machine

    flags.check()
    directory = checkpoint_directory() if arguments.tiny == HERE else Path(arguments.tiny)
    environment, where = chosen(os.environ, arguments.profile, arguments.operators), machine()
    # Kernels read the packed caches of serving; what they are is not asked of the other precisions
    # unless the user says so.
    forced = {flags.implementation(operator, environment).value for operator in flags.OPERATORS} - {
        flags.AUTO,
        flags.REFERENCE,
    }
    default = (
        [flags.read("DSV4_PRECISION")]
        if "DSV4_PRECISION" in os.environ or forced
        else ["exact", "official", "serving"]
    )
    wanted = settings(arguments.precision or default, environment, where.type != "cpu")
    _check_directory(directory, shipped=arguments.tiny == HERE)
    printing = arguments.json != Path("-")
    if printing:
        print(
            f"{directory} on {where.type}, {'quick' if arguments.quick else 'in full'}", flush=True
        )

    def say(outcome: Outcome) -> None:
        if printing:
            print(f"{outcome.setting.name}: ran {outcome.kernels}", flush=True)

    if arguments.json and printing:
        from ..bench.store import writable

        writable(arguments.json)
    outcomes = run_gate(directory, wanted, QUICK if arguments.quick else FULL, where, say)
    if arguments.json:
        _write_gate(arguments, directory, outcomes)
    if printing:
        _print_gate(outcomes)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def _check_directory(directory: Path, shipped: bool) -> None:
    from ..accuracy.score import EvalError

    if not directory.is_dir():
        what = "the trained checkpoint of this package" if shipped else "--tiny"
        raise EvalError(f"{what} is not there: {directory} is no directory; give one as --tiny DIR")


def _write_gate(arguments: argparse.Namespace, directory: Path, outcomes: list[Outcome]) -> None:
    from dataclasses import asdict

    from ..accuracy.gate import MARGINS
    from ..bench import environment
    from ..bench.store import write_json

    document = {
        "date": time.strftime("%Y-%m-%d"),
        "checkpoint": str(directory),
        "quick": arguments.quick,
        "passed": all(each.passed for each in outcomes),
        "settings": [each.document() for each in outcomes],
        "margins": {name: asdict(margin) for name, margin in MARGINS.items()},
        "commit": environment.commit(),
        "versions": environment.versions(),
        "machine": environment.machine(),
    }
    if arguments.json == Path("-"):
        print(json.dumps(document, indent=1))
    else:
        write_json(arguments.json, document)


def _print_gate(outcomes: list[Outcome]) -> None:
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for title in ("measure", "value", "95 % interval", "of", "margin", ""):
        table.add_column(
            title,
            justify="left" if title in ("measure", "") else "right",
            no_wrap=title != "measure",  # which gives way where values are wide
        )
    for outcome in outcomes:
        if outcome.rows:
            table.add_row(outcome.rows[0].setting)
        for row in outcome.rows:
            margin = (
                f"≥ {row.least:.3f}"
                if row.least is not None
                else f"≤ {row.most:.3f}"
                if row.most is not None
                else "-"
            )
            verdict = (
                "-"
                if margin == "-"
                else "ok"
                if row.passed
                else "BELOW"
                if row.least is not None
                else "ABOVE"
            )
            table.add_row(
                f" {row.measure}",
                f"{row.value:.4f}",
                f"{row.low:.4f} to {row.high:.4f}",
                str(row.count),
                margin,
                verdict,
            )
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 80).print(table)
    rows = [row for outcome in outcomes for row in outcome.rows]
    for row in rows:
        if not row.passed:
            print(
                f"{row.setting}: {row.measure} is {row.value:.4f}, margin"
                f" {row.least if row.least is not None else row.most:.4f}: {row.why}"
            )
    judged = [row for row in rows if row.why]
    print(f"{sum(row.passed for row in judged)} of {len(judged)} measures keep their margin")
