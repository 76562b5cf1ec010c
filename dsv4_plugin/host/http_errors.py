"""A request that an endpoint of the host stumbles over gets status 400 and one sentence.

The host reads some bodies field by field (`body.get("model")` of a list), and looks up names that a
body holds; what goes wrong there is answered with status 500 and no word.
"""

from __future__ import annotations

import logging
import sys

from fastapi import HTTPException, Request, Response

from .ledger import Seam
from .refusal import first_line

logger = logging.getLogger(__name__)

STUMBLES = (AttributeError, LookupError, TypeError, ValueError)
"""What the host's reading of a body raises."""


async def answer_stumble(request: Request, error: Exception) -> Response:
    """The host's own answer of status 400, whose sentence names the endpoint and what it cannot
    read. The log keeps the traceback: it may be no fault of the request."""
    logger.warning("dsv4_plugin: %s failed on a request", request.url.path, exc_info=error)
    refused = HTTPException(
        400, f"{request.url.path} cannot read this request: {first_line(error)}"
    )
    return await _app().exception_handlers[HTTPException](request, refused)


def _app():
    from sglang.srt.entrypoints.http_server import app

    return app


def serves_http() -> bool:
    """Whether requests come in over HTTP; an `Engine` in somebody's process has no endpoint."""
    loaded = sys.modules
    return (
        "sglang.srt.entrypoints.http_server" in loaded
        or "sglang.srt.entrypoints.engine" not in loaded
    )


def _seam(kind: type[Exception]) -> Seam:
    return Seam(
        target=f"sglang.srt.entrypoints.http_server.app: answer to a {kind.__name__}",
        why="a body that an endpoint cannot read is answered with one sentence",
        remove="the host answers it with status 400",
        test="tests/host/test_api.py",
        value=answer_stumble,
        take=lambda value: _app().add_exception_handler(kind, value),
        found=lambda: [_app().exception_handlers.get(kind)],
    )


HTTP_SEAMS: tuple[Seam, ...] = tuple(map(_seam, STUMBLES))
