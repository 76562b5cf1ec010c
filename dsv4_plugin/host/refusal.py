"""Ending the process with one clear line.

SGLang catches every `Exception` a plugin raises, logs it and goes on as stock; SystemExit passes.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def first_line(error: BaseException) -> str:
    """What `error` says, in one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refuse(error: Exception) -> NoReturn:
    """Prints `error` as one line on stderr and exits with status 2."""
    print(f"dsv4: error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)
