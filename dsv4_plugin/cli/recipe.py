"""List, show, check and run launch recipes."""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..recipe.recipe import Arm, Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|show|run|check")
    verbs.add_parser("list", help="name every recipe")
    show = verbs.add_parser(
        "show",
        help=(
            "print the exact shell command of each arm, with what is known of its speed and"
            " accuracy"
        ),
    )
    show.add_argument(
        "--original",
        action="store_true",
        help="the command that produced the published figure then, on the host of that day",
    )
    run = verbs.add_parser("run", help="start the server of one arm, or all arms that run together")
    check = verbs.add_parser(
        "check", help="ask the installed SGLang whether it would act on every option and variable"
    )
    for verb in (show, run):
        verb.add_argument("name", help="name of the recipe, or the path of a .yaml file")
        verb.add_argument("--arm", help="one of the recipe's arms")
        verb.add_argument("--model-path", help="serve this checkpoint instead of the recipe's")
        verb.add_argument(
            "--concurrency",
            type=int,
            help="what {concurrency} stands for (default: the arm's largest)",
        )
    check.add_argument("name", nargs="*", help="names or paths (default: every recipe)")
    for verb in verbs.choices.values():
        verb.add_argument(
            "--dir", type=Path, help="directory of the recipes (default: the shipped ones)"
        )


def run(arguments: argparse.Namespace) -> int:
    return {"list": _list, "show": _show, "run": _run, "check": _check}[arguments.verb](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from ..recipe.reader import list_recipes

    recipes = list_recipes(arguments.dir)
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        state = (
            recipe.measured
            if isinstance(recipe.measured, str)
            else f"measured at {recipe.measured['commit']}"
        )
        text = f"{recipe.name:<{width}}  {recipe.title} [{state.split(':')[0]}]" + (
            f" [not served by this version: {recipe.not_served}]" if recipe.not_served else ""
        )
        print(textwrap.fill(text, 80, subsequent_indent=" " * (width + 2), break_on_hyphens=False))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from ..recipe.command import command, original_command, shell
    from ..recipe.reader import find_recipe
    from ..recipe.recipe import RecipeError

    recipe = find_recipe(arguments.name, arguments.dir)
    if arguments.original and recipe.original is None:
        raise RecipeError(
            f"recipe {recipe.name} has no original: it was first written for this plugin"
        )
    arms = recipe.original.arms if arguments.original else recipe.arms
    chosen = arms if arguments.arm is None else [arm for arm in arms if arm.name == arguments.arm]
    if not chosen:
        recipe.arm(arguments.arm)
    print("\n".join(f"# {line}" for line in _facts(recipe, arguments.original)))
    for arm in chosen:
        print(
            f"\n# arm {arm.name}"
            + (f" ({arm.role})" if arm.role != "server" else "")
            + (f", concurrency {' '.join(map(str, arm.concurrency))}" if arm.concurrency else "")
        )
        if arm.not_served:
            print(f"# not served by this version: {arm.not_served}")
        if arguments.original:
            words = original_command(recipe, arm, arguments.concurrency)
        else:
            words = command(recipe, arm, arguments.model_path, arguments.concurrency)
        print(shell(words, arm.environment))
    return 0


def _facts(recipe: Recipe, original: bool) -> list[str]:
    lines = [recipe.title, f"{recipe.model} on {recipe.gpus} x {recipe.gpu}"]
    if original and recipe.original:
        lines += [
            f"image {recipe.original.image}",
            f"source {recipe.original.source}",
            *recipe.original.notes,
        ]
    else:
        lines += [f"host {recipe.host}, image {recipe.image}", *recipe.notes]
    accuracy = recipe.accuracy
    lines.append(
        f"accuracy: {accuracy['none']}"
        if "none" in accuracy
        else f"accuracy: {accuracy['task']} at least {accuracy['threshold']} ({accuracy['source']})"
        + (f", reported {accuracy['reported']}" if "reported" in accuracy else "")
    )
    if recipe.published:
        points = ", ".join(
            f"{p.concurrency}: {p.tput_per_gpu:g}" + (f" @{p.intvty:g}" if p.intvty else "")
            for p in recipe.published
        )
        lines.append(f"published tokens/s/GPU by concurrency (@tokens/s/user): {points}")
    lines.append(f"published: {recipe.published_note}")
    if isinstance(recipe.measured, str):
        lines.append(f"measured: {recipe.measured}")
    else:
        lines.append(
            "measured: " + ", ".join(f"{key} {value}" for key, value in recipe.measured.items())
        )
    return lines


def _run(arguments: argparse.Namespace) -> int:
    from ..recipe.command import command, of_this_python, shell
    from ..recipe.group import Member, run_together
    from ..recipe.reader import find_recipe
    from ..recipe.recipe import RecipeError

    recipe = find_recipe(arguments.name, arguments.dir)
    group = recipe.group if arguments.arm is None else ()
    arms = group or (recipe.arm(arguments.arm),)
    for arm in arms:
        if arm.not_served:
            raise RecipeError(
                f"recipe {recipe.name}, arm {arm.name}: not served by this version:"
                f" {arm.not_served}"
            )
    problems = [problem for _, problem in _problems([(recipe, arm) for arm in arms])]
    if problems:
        raise RecipeError(f"recipe {recipe.name}: " + "; ".join(problems))
    commands = [command(recipe, arm, arguments.model_path, arguments.concurrency) for arm in arms]
    for arm, words in zip(arms, commands):
        print(shell(words, arm.environment), flush=True)
    if group:
        return run_together(
            [
                Member(arm.name, words, arm.environment, leads=arm.role == "router")
                for arm, words in zip(arms, commands)
            ]
        )
    words = of_this_python(commands[0])
    os.execve(words[0], words, {**os.environ, **arms[0].environment})


def _check(arguments: argparse.Namespace) -> int:
    from ..host import arguments as host
    from ..recipe.reader import find_recipe, list_recipes

    recipes = (
        [find_recipe(name, arguments.dir) for name in arguments.name]
        if arguments.name
        else list_recipes(arguments.dir)
    )
    print(f"against SGLang {host.host_version()}")
    found = _problems([(recipe, arm) for recipe in recipes for arm in recipe.arms])
    for recipe in recipes:
        problems = [problem for owner, problem in found if owner is recipe]
        mark = f", not served by this version: {recipe.not_served}" if recipe.not_served else ""
        print(f"{recipe.name}: {'refused' if problems else 'ok'}{mark}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if found else 0


def _problems(arms: list[tuple[Recipe, Arm]]) -> list[tuple[Recipe, str]]:
    """What the installed host or plugin would not do as a recipe says, with the recipe and the
    arm."""
    from ..host import arguments as host

    found, launches = [], []
    for recipe, arm in arms:
        reasons = host.environment_problems(arm.environment)
        reasons += [f"dsv4 serve has no option {word}" for word in _unknown_to_serve(recipe)]
        if arm.role != "router":  # another program, with a parser of its own
            words = _host_words(recipe, arm)
            refused = host.argument_problems(words)
            reasons += refused
            if not refused:
                launches.append((recipe, arm, words))
        found += [(recipe, f"arm {arm.name}: {reason}") for reason in reasons]
    return found + _resolved(launches)


def _resolved(launches: list[tuple[Recipe, Arm, list[str]]]) -> list[tuple[Recipe, str]]:
    """What the host's own resolution changes, and marks `not_served` that are untrue, for models
    whose config.json is at hand."""
    import tempfile

    from ..host import arguments as host
    from ..recipe.command import model_config

    with tempfile.TemporaryDirectory() as directory:
        known = []
        for index, (recipe, arm, words) in enumerate(launches):
            config = model_config(recipe.model)
            if config is not None:
                place = Path(directory, str(index))
                place.mkdir()
                (place / "config.json").write_text(config)
                known.append((recipe, arm, ["--model-path", str(place), *words[2:]]))
        answers = host.resolve([words for _, _, words in known])
    return [
        (recipe, f"arm {arm.name}: {reason}")
        for (recipe, arm, _), answer in zip(known, answers)
        for reason in (*answer.problems, *_mark_problems(arm, answer.refusal))
    ]


def _mark_problems(arm: Arm, refusal: str) -> list[str]:
    """Whether an arm's mark `not_served` tells what this version would do with it, and for the
    reason it names."""
    if refusal and not arm.not_served:
        return [
            f"this version refuses to start it ({refusal.partition('. ')[0]}), and the recipe does"
            " not say so; add not_served"
        ]
    if arm.not_served and not refusal:
        return [
            f"it is marked not_served ({arm.not_served}), but this version would start it; remove"
            " the mark"
        ]
    option = refusal.split(" ")[0]
    if arm.not_served and option not in arm.not_served:
        return [
            f"it is marked not_served ({arm.not_served}), which does not name what is refused:"
            f" {refusal.partition('. ')[0]}"
        ]
    return []


def _host_words(recipe: Recipe, arm: Arm) -> list[str]:
    """The arguments that reach the host, as `dsv4 serve` hands them on."""
    from ..recipe.command import option_words

    device = "cpu" if "--cpu" in recipe.serve else "cuda"  # ROCm's device is called cuda too
    return [
        "--model-path",
        recipe.model,
        "--device",
        device,
        *option_words(arm.arguments, max(arm.concurrency, default=1)),
    ]


def _unknown_to_serve(recipe: Recipe) -> list[str]:
    from . import serve

    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve.add_arguments(parser)
    return parser.parse_known_args([recipe.model, *recipe.serve])[1]
