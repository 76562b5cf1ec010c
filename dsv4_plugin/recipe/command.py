"""The shell command that a recipe means, and the config of the model that it serves."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.released import MODELS
from .recipe import Arm, Recipe

ROUTER = ("python", "-m", "sglang_router.launch_router", "--pd-disaggregation")


def model_config(model: str) -> str | None:
    """Text of the config.json of a recipe's model: of its directory, or of the released model it
    names; None when neither is known."""
    own = Path(model, "config.json")
    if own.is_file():
        return own.read_text()
    name = model.split("/")[-1].lower()
    # The longest name first: "pro-0813" before "pro".
    for released in sorted((path.stem for path in MODELS.glob("*.json")), key=len, reverse=True):
        if f"v4-{released}" in name:
            config = json.loads((MODELS / f"{released}.json").read_text())
            return json.dumps(
                {**config, "expert_dtype": "fp8"} if name.endswith("-fp8") else config
            )
    return None


def option_words(arguments: Mapping[str, Any], concurrency: int) -> list[str]:
    """Words of a command line; {concurrency} in a value stands for the largest concurrency that is
    run."""
    words: list[str] = []
    for name, value in arguments.items():
        words.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [str(each).replace("{concurrency}", str(concurrency)) for each in values]
    return words


def command(
    recipe: Recipe, arm: Arm, model: str | None = None, concurrency: int | None = None
) -> list[str]:
    """Words that launch one arm, without its environment. `model` replaces the recipe's."""
    options = option_words(arm.arguments, concurrency or max(arm.concurrency, default=1))
    if arm.role == "router":
        return [*ROUTER, *options]
    return ["dsv4", "serve", model or recipe.model, *recipe.serve, *options]


def original_command(recipe: Recipe, arm: Arm, concurrency: int | None = None) -> list[str]:
    """Words that launched one arm of the original; its model is the recipe's."""
    options = option_words(arm.arguments, concurrency or max(arm.concurrency, default=1))
    return ["python", "-m", "sglang.launch_server", "--model-path", recipe.model, *options]


def of_this_python(words: Sequence[str]) -> list[str]:
    """`words` with `dsv4` and `python` as those of the Python that runs now, whatever PATH says."""
    programs = {"dsv4": [sys.executable, "-m", "dsv4_plugin"], "python": [sys.executable]}
    return [*programs.get(words[0], words[:1]), *words[1:]]


def shell(words: list[str], environment: Mapping[str, str]) -> str:
    """The command as one shell command over several lines, an option a line."""
    lines = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    current: list[str] = []
    for word in words:
        if word.startswith("--") and current:
            lines.append(" ".join(current))
            current = []
        current.append(shlex.quote(word))
    return " \\\n  ".join([*lines, " ".join(current)])
