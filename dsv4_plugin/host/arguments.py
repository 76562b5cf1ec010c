"""What the installed host does with launch options and environment names, asked of the host itself.

SGLang's parser takes abbreviations, keeps only the last of a repeated option, and ignores
environment names it does not know. A recipe that relies on any of that says something other than
what runs, so each is a problem here.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from .. import flags
from ..spelling import suggestion
from . import launch

FOREIGN_PREFIXES = (*flags.LIBRARY_PREFIXES, "HF_", "TORCH_", "PYTORCH_", "PYTHON", "LD_")
"""Prefixes of other programs' variables, whose names this project cannot check."""


class _Refused(Exception):
    """What the host's parser would have printed before it exits."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise _Refused(message)


@functools.lru_cache(maxsize=1)
def parser() -> _Parser:
    """The parser of the installed SGLang; raises instead of ending the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of quantisation methods that this machine lacks
        from sglang.srt.server_args import ServerArgs

        made = _Parser(prog="sglang")
        ServerArgs.add_cli_args(made)
    return made


def host_version() -> str:
    """Version of the installed SGLang."""
    from sglang.version import __version__

    return __version__


def argument_problems(words: Sequence[str]) -> list[str]:
    """Why the installed host would refuse, drop or reinterpret these command-line words; empty when
    it would do neither.

    `words` are a server's arguments with the model's. Parsing only: nothing is loaded.
    """
    actions = parser()._option_string_actions
    problems, seen = [], {}
    for word in words:
        if not word.startswith("--"):
            continue
        name = word.split("=")[0]
        action = actions.get(name)
        if action is None:
            problems.append(_unknown(name, actions))
            continue
        if action.dest in seen:
            problems.append(
                f"{name} is given twice ({seen[action.dest]} before it); the host keeps the last"
                " and drops the other"
            )
        seen[action.dest] = name
        if type(action).__name__.startswith("Deprecated"):
            replacement = getattr(action, "new_flag", None)
            problems.append(
                f"{name} is deprecated in SGLang {host_version()}; "
                + (f"use {replacement}" if replacement else "it does nothing")
            )
    if not problems:
        try:
            parser().parse_args(list(words))
        except _Refused as refused:
            problems.append(str(refused))
    return problems


def _unknown(name: str, known: Iterable[str]) -> str:
    longer = sorted(option for option in known if option.startswith(name))
    if longer:
        return f"{name} is an abbreviation of {', '.join(longer)}; write the whole option"
    return _with_near_name(f"{name} is no option of SGLang {host_version()}", name, known)


def _with_near_name(problem: str, name: str, known: Iterable[str]) -> str:
    return "; ".join(filter(None, (problem, suggestion(name, known, otherwise=""))))


def environment_problems(environment: Mapping[str, str]) -> list[str]:
    """Names and values that neither this plugin nor the installed host would act on."""
    problems = []
    for name, value in environment.items():
        if name.startswith(flags.PREFIX) or name in flags.foreign_flags():
            try:
                flags.check({name: value})
            except flags.FlagError as error:
                problems.append(str(error))
        elif not name.startswith(FOREIGN_PREFIXES) and not _host_reads(name):
            problem = f"{name} is read neither by SGLang {host_version()} nor by this plugin"
            problems.append(_with_near_name(problem, name, _declared_names()))
    if not problems:
        try:
            flags.check(environment)  # contradictions between variables
        except flags.FlagError as error:
            problems.append(str(error))
    return problems


@functools.lru_cache(maxsize=1)
def _declared_names() -> list[str]:
    from sglang.srt import environ

    return [name for name in dir(type(environ.envs)) if name.isupper()]


def _host_reads(name: str) -> bool:
    return name in _declared_names() or name in _names_in_source()


@functools.lru_cache(maxsize=1)
def _names_in_source() -> frozenset[str]:
    """SGLANG_* words anywhere in the host's source: some variables are read without being
    declared."""
    import sglang

    words: set[str] = set()
    for path in Path(sglang.__file__).parent.rglob("*.py"):
        words.update(
            re.findall(
                r"""["'](SGLANG_[A-Z0-9_]+)["']""",
                path.read_text(encoding="utf-8", errors="ignore"),
            )
        )
    return frozenset(words)


class Resolution(NamedTuple):
    """What comes of a launch's words."""

    problems: list[str]
    """Options that the host would silently change, or why it refuses."""
    refusal: str
    """Why this plugin refuses what the host resolved them to; "" when it would serve."""


def resolve(launches: Sequence[Sequence[str]]) -> list[Resolution]:
    """What the host and this plugin make of each launch's words.

    `--model-path` must be a directory that holds a config.json; no weight and no tokenizer is read.
    Resolution writes to the environment and to the host's globals, so each launch is resolved in a
    process of its own. It asks for what this machine has: branches for GPUs that are not here are
    not taken.
    """
    # Forked from a server process that has imported the host and runs no thread: a fork of this
    # process could hang.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__, "sglang.srt.server_args", "sglang.srt.arg_groups.pipeline"]
    )
    answers = []
    for words in launches:
        with ProcessPoolExecutor(1, context) as process:
            answers.append(process.submit(_resolve, list(words)).result())
    return answers


def _resolve(words: list[str]) -> Resolution:
    import logging

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from sglang.srt.server_args import ServerArgs

    asked = parser().parse_args([*words, "--skip-tokenizer-init"])
    server = ServerArgs.from_cli_args(asked)
    try:
        server.resolve_once()
    except Exception as error:
        return Resolution([f"SGLang {host_version()} refuses it: {error}"], "")
    resolved = server.resolved_dict()
    problems = []
    for word in words:
        action = parser()._option_string_actions.get(word.split("=")[0])
        if action is None or action.dest not in resolved:
            continue
        wanted, got = getattr(asked, action.dest), resolved[action.dest]
        # The chunk is a budget of all attention groups together, and the host shares it out.
        shared = action.dest == "chunked_prefill_size" and got * resolved["attn_dp_size"] == wanted
        if got != wanted and not shared:
            problems.append(
                f"{word} {wanted} would become {got}: SGLang {host_version()} overrides it for this"
                " model"
            )
    return Resolution(problems, _refusal(SimpleNamespace(**resolved)))


def _refusal(resolved: SimpleNamespace) -> str:
    """The sentence with which the start-up of this plugin refuses resolved arguments; called in a
    process of its own."""
    # as `dsv4 serve` sets it
    os.environ["DSV4_DEVICE"] = "cpu" if resolved.device == "cpu" else "auto"
    try:
        launch.check_arguments(resolved)
    except launch.LaunchError as error:
        return str(error)
    return ""
