"""Kernels of the installed SGLang behind the operators' signatures, for comparison in one process.

Importing this offers them as `host`; each file imports SGLang, and is imported only where its
operator's flag names `host`. docs/kernels.md says what ran.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ... import ops  # noqa: F401  registers the operators
from ...ops.operator import OPERATORS, Implementation, Requirement
from .. import version


def _offer(
    operator: str,
    requires: Requirement,
    packages: tuple[str, ...] = (),
    archs: tuple[str, ...] = (),
    fp8: bool = False,
) -> None:
    """Adds `host` to an operator, for the SGLang that this package supports alone."""

    @functools.wraps(requires)
    def with_host(*args: Any, **kwargs: Any) -> str | None:
        try:
            version.check()
        except version.HostVersionError as error:
            return str(error)
        return requires(*args, **kwargs)

    OPERATORS[operator].add(
        Implementation(
            "host",
            f"{__name__}.{operator}:{operator}",
            packages=("sglang", *packages),
            archs=archs,
            fp8=fp8,
            requires=with_host,
            measured=False,
        )
    )


def _of(operator: str, name: str) -> Requirement:
    """What our implementation `name` requires: the same data."""
    return OPERATORS[operator].implementations[name].requires


def _fp8_row(x: torch.Tensor, weight: torch.Tensor, eps: float, keep: str) -> str | None:
    if keep == "normed":
        return "keep is normed, and the host's kernel always writes FP8 too"
    return _of("rms_norm_quant", "triton")(x, weight, eps, keep)


def _deep_gemm(q: torch.Tensor, weights: torch.Tensor, cache: Any, plan: Any) -> str | None:
    if reason := _of("indexer_logits", "triton")(q, weights, cache, plan):
        return reason
    heads = q.shape[1]
    return None if heads in (32, 64) else f"{heads} heads are neither 32 nor 64"


_offer("rms_norm_quant", _fp8_row, fp8=True)
_offer("block_fp8_linear", _of("block_fp8_linear", "triton"), fp8=True)
_offer("indexer_logits", _deep_gemm, packages=("sgl-deep-gemm",), archs=("sm_90", "sm_100"))
_offer(
    "sparse_mla",
    _of("sparse_mla", "aiter"),
    archs=("gfx942", "gfx950", "sm_90", "sm_100"),
)
