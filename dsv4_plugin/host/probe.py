"""What a server that starts runs before it can be ready: implementations that were asked for by
name, and the known-answer probe (DSV4_PROBE=1)."""

from __future__ import annotations

import logging
import time

from .. import device, flags
from ..model import DeepseekV4
from ..ops.operator import OPERATORS, SelectionError
from ..runtime.probe import ProbeError, probe, run_once
from .refusal import refuse

logger = logging.getLogger(__name__)


def run_what_is_named(model: DeepseekV4) -> None:
    """Where implementations were asked for by name, runs a fixed prompt through the loaded `model`:
    one that does not compile ends the process with one line, now and not while it serves."""
    if device.arch() == device.CPU or not any(each.named for each in OPERATORS.values()):
        return
    start = time.perf_counter()
    try:
        run_once(model)
    except SelectionError as error:
        refuse(error)
    logger.info(
        "dsv4_plugin: the implementations asked for by name run; compiled and tried in %.1f s",
        time.perf_counter() - start,
    )


def probe_if_asked(model: DeepseekV4) -> None:
    """With DSV4_PROBE=1, checks the loaded `model` against its references before the server can
    become ready.

    A mismatch ends the process with one line that names operator and layer.
    """
    if not flags.enabled("DSV4_PROBE"):
        return
    start = time.perf_counter()
    try:
        found = probe(model)
    except (ProbeError, SelectionError) as error:
        refuse(error)
    what = ", ".join(
        f"{name} in {implementation}" for name, implementation in found.compared.items()
    )
    logger.info(
        "dsv4_plugin: probe of %d tokens passed in %.1f s: layers %s, %s",
        found.tokens,
        time.perf_counter() - start,
        ", ".join(map(str, found.layers)),
        (
            f"{found.calls} calls compared ({what}), the worst error {found.worst:.0%} of what is"
            " allowed"
            if what
            else (
                "every operator runs its reference, so the logits were checked to be finite and"
                " nothing else"
            )
        ),
    )
    if found.choices.differing:
        logger.warning(
            "dsv4_plugin: left to themselves ranks would choose differently (%s); rank 0 decides"
            " for all. Their arithmetic is not the same bits: look for a library that tunes itself"
            " on each rank",
            found.choices,
        )
    elif found.choices.compared:
        logger.info(
            "dsv4_plugin: all ranks make the same %d choices by themselves", found.choices.compared
        )
