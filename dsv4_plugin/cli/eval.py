"""Accuracy of a running OpenAI-compatible server: GSM8K, needles in long texts, and the difference of two servers.

The exit status is 1 when a score is below its threshold, or when the server is worse than the one of --against by more
than two standard errors of their difference.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bench.accuracy import Score
    from ..bench.recipe import Recipe

HUB = "hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="address of the server, such as http://127.0.0.1:30000")
    parser.add_argument("--gsm8k", nargs="?", const=HUB, metavar="DIR",
                        help="score GSM8K; DIR holds its train.jsonl and test.jsonl (default: the dataset of the Hugging Face hub)")
    parser.add_argument("--needle", type=_lengths, metavar="N,N,...", help="ask for a number hidden in texts of so many tokens, such as 4k,32k")
    parser.add_argument("--recipe", help="take task and threshold from this recipe")
    parser.add_argument("--against", metavar="URL|FILE", help="another server, or an earlier --out, to compare item by item")
    parser.add_argument("--threshold", type=float, help="least score of GSM8K (default: the recipe's)")
    parser.add_argument("--needle-threshold", type=float, help="least share of needles found")
    parser.add_argument("--standard-errors", type=float, default=2.0, metavar="K", help="a difference of more is real (default: %(default)g)")
    parser.add_argument("--metric", choices=("strict-match", "flexible-extract"), default="strict-match",
                        help="GSM8K: the number after ####, or the last number of the answer (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="first questions only")
    parser.add_argument("--needles", type=int, default=1, metavar="N", help="needles at every length and depth (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the needles (default: %(default)s)")
    parser.add_argument("--api", choices=("chat", "completions"), default="chat", help="how questions are asked (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest answer (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="GSM8K questions at once (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write scores with every item as JSON")


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(word[:-1]) * 1024 if word.lower().endswith("k") else int(word) for word in text.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of lengths, such as 4k,32k")
    return lengths


def run(arguments: argparse.Namespace) -> int:
    from ..bench.accuracy import difference

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
        print(f"{found.task} against {arguments.against}: {found.mean:+.4f} ± {found.stderr or 0:.4f}, {found.better} items better and {found.worse} "
              f"worse: {'WORSE' if worse else 'no worse'} by {arguments.standard_errors:g} standard errors")
    if arguments.out:
        _write(arguments, scores, differences, thresholds)
    return 1 if any(failed) else 0


def _recipe(arguments: argparse.Namespace) -> Recipe | None:
    """The recipe; its task is asked for unless the user named one. Raises EvalError when there is nothing to evaluate."""
    from ..bench.accuracy import EvalError
    from ..bench.recipe import find_recipe

    recipe = find_recipe(arguments.recipe) if arguments.recipe else None
    if recipe is not None and not arguments.gsm8k and not arguments.needle:
        if recipe.accuracy.get("task") != "gsm8k":
            raise EvalError(f"recipe {recipe.name} names no task ({recipe.accuracy.get('none') or recipe.accuracy['task']}); give --gsm8k or --needle")
        arguments.gsm8k = HUB
    if not arguments.gsm8k and not arguments.needle:
        raise EvalError("nothing to evaluate; give --gsm8k DIR, --needle LENGTHS, or --recipe NAME")
    for name, value in (("--limit", arguments.limit), ("--needles", arguments.needles), ("--max-tokens", arguments.max_tokens), ("--concurrency", arguments.concurrency)):
        if value is not None and value < 1:
            raise EvalError(f"{name} is {value}; it must be above 0")
    return recipe


def _thresholds(arguments: argparse.Namespace, recipe: Recipe | None) -> dict[str, float]:
    """Least score by task."""
    found = {"gsm8k": arguments.threshold, "needle": arguments.needle_threshold}
    if found["gsm8k"] is None and recipe is not None and recipe.accuracy.get("task") == "gsm8k":
        found["gsm8k"] = recipe.accuracy["threshold"]
    return {task: value for task, value in found.items() if value is not None}


def _scores(arguments: argparse.Namespace, url: str) -> list[Score]:
    from ..bench import gsm8k, needle
    from ..bench.server import model_name

    model, chat, scores = model_name(url), arguments.api == "chat", []
    if arguments.gsm8k:
        data = None if arguments.gsm8k == HUB else Path(arguments.gsm8k)
        scores.append(gsm8k.evaluate(url, model, data, chat=chat, limit=arguments.limit, concurrency=arguments.concurrency,
                                     max_tokens=arguments.max_tokens, metric=arguments.metric))
    if arguments.needle:
        def say(case, answer, found):
            print(f"needle: {answer.prompt_tokens} tokens, depth {case.depth:g}: {'found' if found else f'MISSED, it said {answer.text[:60]!r}'}", flush=True)

        scores.append(needle.evaluate(needle.asker(url, model, chat, arguments.max_tokens), arguments.needle, arguments.needles, arguments.seed, say))
    return scores


def _judged(score: Score, threshold: float | None) -> bool:
    """Prints a score and returns whether it keeps its threshold."""
    passed = threshold is None or score.mean >= threshold
    verdict = "no threshold" if threshold is None else f"threshold {threshold:g}: {'passed' if passed else 'BELOW'}"
    print(f"{score.task} ({score.metric}): {score.mean:.4f} ± {score.stderr or 0:.4f} over {len(score.items)} items; {verdict}")
    return passed


def _pairs(arguments: argparse.Namespace, scores: list[Score]) -> list[tuple[Score, Score]]:
    """Every score with the other server's of the same task."""
    from ..bench.accuracy import EvalError, read_scores

    if not arguments.against:
        return []
    remote = arguments.against.startswith(("http://", "https://"))
    others = {score.task: score for score in (_scores(arguments, arguments.against) if remote else read_scores(Path(arguments.against)))}
    missing = [score.task for score in scores if score.task not in others]
    if missing:
        raise EvalError(f"{arguments.against} has no score of {', '.join(missing)}; it has {', '.join(others)}")
    return [(score, others[score.task]) for score in scores]


def _write(arguments: argparse.Namespace, scores: list[Score], differences: list[Any], thresholds: dict[str, float]) -> None:
    from dataclasses import asdict

    from ..bench import environment
    from ..bench.server import model_name
    from ..bench.store import write_json

    write_json(arguments.out, {
        "date": time.strftime("%Y-%m-%d"), "url": arguments.url, "model": model_name(arguments.url), "api": arguments.api, "thresholds": thresholds,
        "scores": [score.document() for score in scores], "against": arguments.against, "differences": [asdict(each) for each in differences],
        "commit": environment.commit(), "versions": environment.versions()})
