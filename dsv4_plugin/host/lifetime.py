"""Whatever a server started ends with it, at every moment of its life.

On every signal that can be handled, the main process ends what it started before it goes. For
SIGKILL, SGLang's workers ask the kernel to end with their parent; what that misses is a parent that
went while they still imported.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from contextlib import suppress

_PR_GET_PDEATHSIG = 2
"""Of <linux/prctl.h>."""
_REAP_SECONDS = 30
"""Time given to killed processes to go: a GPU's memory is given back by then."""

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""What ends a process without a Python exception; SIGINT raises KeyboardInterrupt."""


def end_if_orphaned() -> None:
    """Ends this process if it asked to end with its parent and the parent had ended before.

    SGLang's detokenizers and controllers ask first and load plugins then, which is in time; its
    schedulers ask later, and a seam there calls this again.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and _asked_to_end_with_parent() and not parent.is_alive():
        os._exit(1)


def _asked_to_end_with_parent() -> bool:
    asked = ctypes.c_int(0)
    ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(asked))
    return asked.value != 0


def end_on_signals() -> None:
    """From now on, a signal that would end this process at once first ends what it started.

    At once means without unwinding: SGLang's half-built sockets would wait for peers that have
    gone. Its running server takes SIGTERM over and drains first.
    """

    def end(number: int, frame: object) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt this
        end_children()
        os._exit(128 + number)

    for each in _SIGNALS:
        signal.signal(each, end)


def end_children() -> None:
    """Kills every process that this one started, and theirs, and returns when they have gone.

    SGLang's `kill_process_tree` waits a minute for children that nobody reaps.
    """
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=_REAP_SECONDS)
