"""Caches on their way from a prefill server to a decode server (`--disaggregation-mode`).

All of it is SGLang's: its pool registers its pages and rings with a transfer engine, and the decode
side admits a request when they have come. What is here is the engine's package, looked for before a
process starts, and what SGLang does only with a GPU.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

from .ledger import Seam, attribute_seam

ENGINES = {"mooncake": "mooncake.engine", "mooncake_tcp": "mooncake.engine"}
"""Modules of the transfer engines that were run with this model, by the host's name."""
INSTALL = (
    "pip install 'dsv4_plugin[disaggregation]', and on Debian apt-get install libibverbs1"
    " libnl-route-3-200 librdmacm1"
)
EARLY_SEND = "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"
"""A prefix that is cached already would be sent while the prompt is still computed, after an event
of a GPU."""


def missing_engine(backend: str) -> str | None:
    """Why the transfer engine `backend` cannot be used here; None where it can, or where its name
    is the host's to judge."""
    if backend not in ENGINES:
        return None
    try:
        importlib.import_module(ENGINES[backend])
    except ImportError as error:  # no package, or a library that it is linked with
        return f"its transfer engine cannot be loaded ({error}); {INSTALL}"
    return None


def set_cpu_environment() -> None:
    """Where the device is a CPU, in the main process: what workers are started with."""
    os.environ.setdefault(EARLY_SEND, "0")


def cpu_seams(backend: str) -> Iterator[Seam]:
    """The seams of the transfer engine `backend`, for a worker on our CPU platform."""
    if backend not in ENGINES:
        return
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    yield attribute_seam(
        MooncakeKVSender,
        "supports_host_tensor_indices",
        False,
        why="the host copies page numbers through pinned memory and waits for an event of a GPU",
        remove="the host looks whether the device is a GPU",
        test="tests/host/test_disaggregation.py",
    )
