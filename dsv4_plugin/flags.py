"""The one table of switches, read from DSV4_* environment variables."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .config import Precision

PREFIX = "DSV4_"


class FlagError(ValueError):
    """A DSV4_* variable that does not exist, or a value it does not take."""


@dataclass(frozen=True)
class Flag:
    """One switch: an environment variable, the values it takes, the one it has when unset, and what it does.

    `values` lists the values, or is the one regular expression that every value matches.
    """

    name: str
    values: tuple[str, ...] | re.Pattern[str]
    default: str
    meaning: str

    def takes(self, value: str) -> bool:
        if isinstance(self.values, re.Pattern):
            return self.values.fullmatch(value) is not None
        return value in self.values

    @property
    def choices(self) -> str:
        """The values, in words."""
        return self.values.pattern if isinstance(self.values, re.Pattern) else " or ".join(self.values)


OPERATORS: dict[str, str] = {
    "rms_norm_quant": "RMSNorm with FP8 quantisation",
    "block_fp8_linear": "matrix products with 128x128-block FP8 weights",
    "qk_norm_rope_store": "query and latent norm, RoPE and the latent's store",
    "rope_hadamard_quant": "indexer queries: RoPE, Hadamard rotation, quantisation",
    "compress": "compression of 4 or 128 tokens into one entry",
    "indexer_logits": "scores of the lightning indexer",
    "topk_select": "selection of the compressed entries to attend to",
    "build_step_plan": "index tensors of a step",
    "sparse_mla": "attention over window and compressed entries",
    "grouped_output": "inverse RoPE and the grouped output projection",
    "mhc_pre": "hyper-connections before a sub-layer",
    "mhc_post": "hyper-connections after a sub-layer",
    "mhc_head": "collapse of the residual streams before the head",
    "route": "choice of experts",
    "moe": "routed experts",
    "shared_expert": "the shared expert",
    "sample_greedy": "greedy sampling",
}
"""Operators that can be switched, and what each does."""

IMPLEMENTATIONS = ("auto", "reference", "triton", "tilelang", "flydsl", "aiter", "host")
_LAYER_LIST = re.compile(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?")


def operator_flag(operator: str) -> str:
    """The flag that chooses the implementation of `operator`."""
    return f"DSV4_{operator.upper()}"


def layers_flag(operator: str) -> str:
    """The flag that restricts the chosen implementation of `operator` to some layers."""
    return f"DSV4_LAYERS_{operator.upper()}"


def _operator_rows() -> tuple[Flag, ...]:
    return tuple(row for name, what in OPERATORS.items() for row in (
        Flag(operator_flag(name), IMPLEMENTATIONS, "auto",
             f"Implementation of {name}: {what}. auto takes the first that can run; one that is named must run."),
        Flag(layers_flag(name), _LAYER_LIST, "",
             f"Layers, as 0-3,7, that take the implementation of {name}; all others take the reference."),
    ))


FLAGS: tuple[Flag, ...] = (
    Flag("DSV4_PLUGIN", ("0", "1"), "1",
         "0: the plugin does nothing at all and the server is stock SGLang."),
    Flag("DSV4_STRICT", ("0", "1"), "0",
         "1: a seam of the host that does not hold stops the start; 0: it is logged as an error."),
    Flag("DSV4_DEVICE", ("auto", "cpu"), "auto",
         "cpu: serve on the CPU through the plugin's own platform; auto: SGLang's platform of this machine."),
    Flag("DSV4_PRECISION", tuple(p.value for p in Precision), Precision.SERVING.value,
         "exact: fp32 weights, caches and arithmetic, for checking; official: exact plus the roundings of the "
         "model's own cache; serving: bf16 and the packed cache, for production."),
    *_operator_rows(),
)

_BY_NAME = {flag.name: flag for flag in FLAGS}


def read(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """The value of flag `name`, its default when unset. Raises FlagError for a value the flag does not take."""
    flag = _BY_NAME[name]
    value = environ.get(name, flag.default)
    if not flag.takes(value):
        raise FlagError(f"{name}={value!r} is not a value of this flag; it takes {flag.choices}")
    return value


def enabled(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a 0/1 flag is 1. Raises FlagError for any other value."""
    return read(name, environ) == "1"


def precision(environ: Mapping[str, str] = os.environ) -> Precision:
    """DSV4_PRECISION. Raises FlagError for an unknown one."""
    return Precision(read("DSV4_PRECISION", environ))


def implementation(operator: str, environ: Mapping[str, str] = os.environ) -> str:
    """The implementation asked for `operator`, "auto" for none. Raises FlagError for an unknown one."""
    return read(operator_flag(operator), environ)


def layers(operator: str, environ: Mapping[str, str] = os.environ) -> frozenset[int] | None:
    """Layers that take the chosen implementation of `operator`, None for all. Raises FlagError for a malformed list."""
    text = read(layers_flag(operator), environ)
    if not text:
        return None
    bounds = ([int(n) for n in part.split("-")] for part in text.split(","))
    return frozenset(layer for bound in bounds for layer in range(bound[0], bound[-1] + 1))


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Raises FlagError for the first DSV4_* variable that is no flag, naming the nearest one, or has a wrong value."""
    for name in sorted(environ):
        if not name.startswith(PREFIX):
            continue
        if name not in _BY_NAME:
            near = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.0)
            raise FlagError(f"{name}={environ[name]!r} is set, but there is no such flag; did you mean {near[0]}?")
        read(name, environ)
