"""The known-answer probe in a server that starts: DSV4_PROBE=1."""

from __future__ import annotations

import logging
import time

from .. import flags
from ..model import DeepseekV4
from ..runtime.probe import ProbeError, probe
from .refusal import refuse

logger = logging.getLogger(__name__)


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
    except ProbeError as error:
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
