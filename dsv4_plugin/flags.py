"""The one table of switches, read from DSV4_* environment variables.

A switch has, in this order, the value of: its own variable; a variable of SGLang's side branch, of
SGLang or of the InferenceX recipes that means the same (foreign_flags.yaml); DSV4_PROFILE
(profiles.yaml); its default. A profile is meant to be overridden in single switches; everything
else that disagrees is an error.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Precision
from .spelling import suggestion

logger = logging.getLogger(__name__)

PREFIX = "DSV4_"
LAYERS = "DSV4_LAYERS_"
ADOPTED = "DSV4_ADOPTED"
LIBRARY_PREFIXES = (
    "AITER_",
    "FLYDSL_",
    "TRITON_",
    "TILELANG_",
    "HIP_",
    "HSA_",
    "GPU_",
    "ROCM_",
    "NCCL_",
    "RCCL_",
    "MIOPEN_",
    "CUDA_",
    "OMP_",
    "GOMP_",
    "MKL_",
    "MC_",  # Mooncake
)
"""Of the variables that compilers and libraries beside this package read."""


class FlagError(ValueError):
    """A DSV4_* variable that does not exist, a value it does not take, or switches that contradict
    one another."""


@dataclass(frozen=True)
class Flag:
    """One switch: an environment variable, the values it takes, the one it has when unset, and what
    it does.

    `listed` are the values, or the one regular expression that every value matches; a flag that
    chooses the implementation of `operator` takes those that the operator has.
    """

    name: str
    listed: tuple[str, ...] | re.Pattern[str]
    default: str
    meaning: str
    form: str = ""
    """The values in words, where they are a regular expression."""
    operator: str = ""

    @property
    def values(self) -> tuple[str, ...] | re.Pattern[str]:
        """What it takes, as `listed`."""
        if self.operator and registered is not None:
            return AUTO, REFERENCE, *registered(self.operator)
        return self.listed

    def takes(self, value: str) -> bool:
        if isinstance(self.values, re.Pattern):
            return self.values.fullmatch(value) is not None
        return value in self.values

    @property
    def choices(self) -> str:
        """The values, in words."""
        return self.form if isinstance(self.values, re.Pattern) else " or ".join(self.values)


@dataclass(frozen=True)
class Setting:
    """The value that a switch has, and what gave it: "default", or the variable and its value.

    One that `yields` is a profile's: where this machine or this version cannot follow it, auto
    decides, and it is logged.
    """

    value: str
    source: str = "default"
    yields: bool = False


@dataclass(frozen=True)
class ForeignChoice:
    """What a foreign variable asks of one operator; a weak one holds only while nothing else is
    asked of it."""

    source: str
    operator: str
    implementation: str
    weak: bool

    @property
    def legal(self) -> bool:
        """Whether the operator has such an implementation."""
        return _BY_NAME[operator_flag(self.operator)].takes(self.implementation)


OPERATORS: dict[str, str] = {
    "rms_norm_quant": "RMSNorm with FP8 quantisation",
    "block_fp8_linear": "matrix products with 128x128-block FP8 weights",
    "linear_fp32": "matrix products of bf16 whose result is fp32",
    "qk_norm_rope_store": "query and latent norm, RoPE and the latent's store",
    "rope_hadamard_quant": "indexer queries: RoPE, Hadamard rotation, quantisation",
    "compress": "compression of 4 or 128 tokens into one entry",
    "indexer_logits": "scores of the lightning indexer",
    "topk_select": "selection of the compressed entries to attend to",
    "build_step_plan": "index tensors of a step",
    "sparse_mla": "attention over window and compressed entries, inverse RoPE of its output",
    "grouped_output": "the grouped output projection",
    "mhc_pre": "hyper-connections, norm and FP8 before a sub-layer",
    "mhc_post": "hyper-connections after a sub-layer",
    "mhc_post_pre": "hyper-connections between two sub-layers",
    "mhc_head": "collapse of the residual streams and norm before the head",
    "route": "choice of experts",
    "moe": "routed experts",
    "shared_expert": "the shared expert",
    "sample_greedy": "greedy sampling",
}
"""Operators that can be switched, and what each does."""

AUTO, REFERENCE = "auto", "reference"
IMPLEMENTATIONS = (AUTO, REFERENCE, "triton", "gluon", "tilelang", "flydsl", "aiter", "host")
"""What an implementation may be called, by the language or package it is made with."""
registered: Callable[[str], Iterable[str]] | None = None
"""Names of the implementations that an operator has; set where operators are defined, None until
that is imported (`dsv4_plugin.ops`)."""
_LAYER_LIST = re.compile(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?")


def operator_flag(operator: str) -> str:
    """The flag that chooses the implementation of `operator`."""
    return f"{PREFIX}{operator.upper()}"


def layers_flag(operator: str) -> str:
    """The flag that restricts the chosen implementation of `operator` to some layers."""
    return f"{LAYERS}{operator.upper()}"


def _data(name: str) -> Any:
    import yaml  # a machine that only runs kernels may lack it

    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


@functools.cache
def profiles() -> dict[str, dict[str, Any]]:
    """Profiles by name: `meaning`, and the implementation of each operator in `operators`."""
    return _data("profiles.yaml")


def _profile_names() -> tuple[str, ...]:
    """The top-level keys of profiles.yaml, without the YAML reader, for they are needed wherever
    this is imported."""
    text = (Path(__file__).parent / "profiles.yaml").read_text(encoding="utf-8")
    return tuple(re.findall(r"""^["']?([\w-]+)["']?:""", text, re.MULTILINE))


@functools.cache
def foreign_flags() -> dict[str, dict[str, Any]]:
    """What each foreign variable means here, by its name (foreign_flags.yaml)."""
    return _data("foreign_flags.yaml")


def _operator_rows() -> tuple[Flag, ...]:
    return tuple(
        row
        for name, what in OPERATORS.items()
        for row in (
            Flag(
                operator_flag(name),
                IMPLEMENTATIONS,
                AUTO,
                f"Implementation of {name}: {what}. auto takes the first that can run; one that is"
                " named must run.",
                operator=name,
            ),
            Flag(
                layers_flag(name),
                _LAYER_LIST,
                "",
                f"Layers that take the implementation of {name}; all others take the reference.",
                "a list of layers as 0-3,7, empty for all",
            ),
        )
    )


FLAGS: tuple[Flag, ...] = (
    Flag(
        "DSV4_PLUGIN",
        ("0", "1"),
        "1",
        "0: the plugin does nothing at all and the server is stock SGLang.",
    ),
    Flag(
        "DSV4_STRICT",
        ("0", "1"),
        "0",
        "1: a seam of the host that does not hold stops the start; 0: it is logged as an error.",
    ),
    Flag(
        "DSV4_DEVICE",
        ("auto", "cpu"),
        "auto",
        "cpu: serve on the CPU through the plugin's own platform; auto: SGLang's platform of this"
        " machine.",
    ),
    Flag(
        "DSV4_PRECISION",
        tuple(p.value for p in Precision),
        Precision.SERVING.value,
        "exact: fp32 weights, caches and arithmetic, for checking; official: exact plus the"
        " roundings of the model's own cache; serving: bf16 and the packed cache, for production.",
    ),
    Flag(
        "DSV4_BUILD",
        ("0", "1"),
        "1",
        "1: `dsv4 serve` on a GPU compiles the kernels that its cache lacks before SGLang starts,"
        " as `dsv4 build` does; 0: they are compiled when they are first launched.",
    ),
    Flag(
        "DSV4_WEIGHTS",
        ("auto", "packed", "dense"),
        "auto",
        "How FP8 matrices lie in memory. packed: as released, read by kernels and multiplied with"
        " FP8 activations; dense: decoded once to bf16 (experts of a GPU aside), which torch"
        " multiplies without decoding them at every call. auto: dense on a CPU, and on a GPU where"
        " block_fp8_linear runs its reference and a sixteenth of the memory holds the difference.",
    ),
    Flag(
        "DSV4_CHOICES",
        ("first", "each"),
        "first",
        "Who chooses experts and entries where the model is split over several ranks. first: rank 0"
        " for all, so that ranks cannot differ; each: every rank for itself, which saves a small"
        " broadcast a choice and is right only where all ranks compute the same bits"
        " (docs/precision.md).",
    ),
    Flag(
        "DSV4_PROBE",
        ("0", "1"),
        "0",
        "1: before the server is ready, a fixed prompt runs through the loaded model and every"
        " operator of the sampled layers is compared with its reference; a mismatch stops the"
        " server.",
    ),
    Flag(
        "DSV4_REPORT",
        re.compile(r".*"),
        "",
        "File for the report of what ran (JSON).",
        "a path; empty: dsv4/active-PORT.json in SGLang's cache directory",
    ),
    Flag(
        "DSV4_PROFILE",
        _profile_names(),
        AUTO,
        "Implementations of all operators at once. safe: torch references; a date: what the side"
        " branch ran at that milestone of the published MI355X curves, as far as this version and"
        " machine have it (auto for the rest, which is logged).",
    ),
    *_operator_rows(),
    Flag(
        ADOPTED,
        re.compile(r".*"),
        "",
        "Set by the plugin for its worker processes: the foreign variables that the user had set,"
        " before SGLang changed some of them.",
        "a JSON object",
    ),
)

_BY_NAME = {flag.name: flag for flag in FLAGS}


def setting(name: str, environ: Mapping[str, str] = os.environ) -> Setting:
    """The value of flag `name` and its source. Raises FlagError for a value that it does not take
    or a contradiction."""
    flag = _BY_NAME[name]
    own = environ.get(name)
    if own is not None and not flag.takes(own):
        raise FlagError(f"{name}={own!r} is not a value of this flag; it takes {flag.choices}")
    if flag.operator:
        return _operator_setting(flag.operator, own, environ)
    return Setting(flag.default) if own is None else Setting(own, f"{name}={own}")


def read(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """The value of flag `name`. Raises FlagError for a value that it does not take or a
    contradiction."""
    return setting(name, environ).value


def enabled(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a 0/1 flag is 1. Raises FlagError for any other value."""
    return read(name, environ) == "1"


def precision(environ: Mapping[str, str] = os.environ) -> Precision:
    """DSV4_PRECISION. Raises FlagError for an unknown one."""
    return Precision(read("DSV4_PRECISION", environ))


def implementation(operator: str, environ: Mapping[str, str] = os.environ) -> Setting:
    """The implementation asked for `operator`, "auto" for none. Raises FlagError for an unknown or
    disputed one."""
    return setting(operator_flag(operator), environ)


def layers(operator: str, environ: Mapping[str, str] = os.environ) -> frozenset[int] | None:
    """Layers that take the chosen implementation of `operator`, None for all. Raises FlagError for
    a malformed list."""
    text = read(layers_flag(operator), environ)
    if not text:
        return None
    bounds = [[int(n) for n in part.split("-")] for part in text.split(",")]
    for bound in bounds:
        if bound[0] > bound[-1]:
            raise FlagError(
                f"{layers_flag(operator)}={text!r}: {bound[0]}-{bound[-1]} runs backwards"
            )
    return frozenset(layer for bound in bounds for layer in range(bound[0], bound[-1] + 1))


def _operator_setting(operator: str, own: str | None, environ: Mapping[str, str]) -> Setting:
    flag = operator_flag(operator)
    choices = [choice for choice in foreign_choices(environ) if choice.operator == operator]
    firm = [choice for choice in choices if not choice.weak]
    asked = [Setting(own, f"{flag}={own}")] if own is not None else []
    asked += [
        Setting(choice.implementation, choice.source)
        for choice in firm or (choices if own is None else [])
        if choice.legal
    ]
    for other in asked[1:]:
        if other.value != asked[0].value:
            raise FlagError(
                f"{asked[0].source} and {other.source} contradict each other: they mean "
                f"{flag}={asked[0].value} and {flag}={other.value}; unset one of them"
            )
    if asked:
        return asked[0]
    profile = read("DSV4_PROFILE", environ)
    chosen = profiles()[profile]["operators"].get(operator)
    return (
        Setting(AUTO) if chosen is None else Setting(chosen, f"DSV4_PROFILE={profile}", yields=True)
    )


def foreign(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Foreign variables of the table that the user has set, by name.

    SGLang itself sets some of them while it resolves its arguments; worker processes read what
    `adopt` kept.
    """
    try:
        origin = json.loads(environ[ADOPTED]) if environ.get(ADOPTED) else environ
    except json.JSONDecodeError:
        raise FlagError(
            f"{ADOPTED}={environ[ADOPTED]!r} is not what the plugin sets for its workers; unset it"
        ) from None
    return {name: origin[name] for name in foreign_flags() if name in origin}


_SWITCH = {
    **dict.fromkeys(("1", "true", "yes", "y"), "enabled"),
    **dict.fromkeys(("0", "false", "no", "n"), "disabled"),
}


def foreign_choices(environ: Mapping[str, str] = os.environ) -> Iterator[ForeignChoice]:
    """What the foreign variables ask for. Raises FlagError for a value that cannot be understood or
    served."""
    for name, value in foreign(environ).items():
        row = foreign_flags()[name]
        if reason := row.get("refuse", {}).get(value.lower()):
            raise FlagError(f"{name}={value}: {reason}")
        if "values" in row:
            meanings = row["values"]
            side = value.lower() if value.lower() in meanings else "other"
        elif "enabled" in row:
            meanings = {"enabled": row["enabled"], "disabled": row.get("disabled", {})}
            side = _SWITCH.get(value.lower(), "other")
        else:
            continue
        if side not in meanings:
            known = " or ".join(row["values"]) if "values" in row else "0 or 1"
            raise FlagError(f"{name}={value!r} is not understood; it takes {known}")
        if isinstance(meanings[side], dict):
            for operator, wanted in meanings[side].items():
                yield ForeignChoice(f"{name}={value}", operator, wanted, weak=side == "disabled")


def mirrors(name: str) -> list[str]:
    """Foreign variables that may set flag `name`."""
    operator = _BY_NAME[name].operator
    meanings = {
        foreign: [*row.get("values", {}).values(), row.get("enabled", {}), row.get("disabled", {})]
        for foreign, row in foreign_flags().items()
    }
    return [
        foreign
        for foreign, sides in meanings.items()
        if operator and any(operator in side for side in sides if isinstance(side, dict))
    ]


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raises FlagError for the first thing that is wrong with the switches.

    That is a DSV4_* variable that is no flag (the nearest one is named), a wrong value, or a
    contradiction.
    """
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in _BY_NAME:
            hint = suggestion(name, _BY_NAME, "`dsv4 flags` prints all there are", PREFIX)
            raise FlagError(f"{name}={environ[name]!r} is set, but there is no such flag; {hint}")
    for flag in FLAGS:
        setting(flag.name, environ)
    for operator in OPERATORS:
        chosen = implementation(operator, environ)
        if layers(operator, environ) is not None and chosen.value == REFERENCE:
            raise FlagError(
                f"{layers_flag(operator)}={environ[layers_flag(operator)]} chooses layers, but "
                f"{chosen.source} gives all of them the reference; unset one of them"
            )


def notes(environ: Mapping[str, str] = os.environ) -> list[str]:
    """One line for each foreign variable that is set: what it was taken for, or why it has no
    effect."""
    choices = list(foreign_choices(environ))
    lines = []
    for name, value in foreign(environ).items():
        row = foreign_flags()[name]
        meanings = row.get("values", {})
        text = meanings.get(value.lower(), meanings.get("other"))
        asked = [
            operator_flag(each.operator) for each in choices if each.source == f"{name}={value}"
        ]
        in_force = {flag: setting(flag, environ) for flag in asked}
        taken = [
            f"{flag}={found.value}"
            for flag, found in in_force.items()
            if found.source == f"{name}={value}"
        ]
        absent = [
            f"{choice.operator} has no implementation {choice.implementation}"
            for choice in choices
            if choice.source == f"{name}={value}" and not choice.legal
        ]
        why = row.get("note") or (
            text
            if isinstance(text, str)
            else ", ".join(absent) or "it asks for nothing that is not decided already"
        )
        lines.append(
            f"{name}={value} is taken as {', '.join(taken)}"
            if taken
            else f"{name}={value} has no effect: {why}"
        )
    return lines


def adopt(environ: MutableMapping[str, str] = os.environ) -> None:
    """Logs what the foreign variables mean and keeps them for the processes to come; done once, by
    the first process."""
    if ADOPTED in environ:
        return
    for line in notes(environ):
        logger.warning("dsv4_plugin: %s", line)
    environ[ADOPTED] = json.dumps(foreign(environ))
