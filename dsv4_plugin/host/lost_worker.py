"""Which worker ended, when a server ends because of it.

The host ends a server that lost a process, and says that one failed. A rank that was killed, for
want of memory for example, says nothing itself; what the log shows is the error of another rank
that was talking to it.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from typing import Any

from sglang.srt.managers.tokenizer_manager import SignalHandler

from .ledger import Seam, attribute_seam

logger = logging.getLogger(__name__)

_end = SignalHandler.running_phase_sigquit_handler


def lost(watchdog: Any) -> Iterator[str]:
    """A sentence for each process of the host's `watchdog` that a signal ended."""
    for name, process in zip(watchdog._names, watchdog._processes):
        if process.exitcode is not None and process.exitcode < 0:
            number = -process.exitcode
            yield (
                f"{name} (pid={process.pid}) was ended by {signal.Signals(number).name}"
                + (", which is what the kernel sends when memory runs out" * (number == 9))
                + "; the server ends with it, and requests in flight are lost"
            )


def end_for_a_lost_worker(self: Any, signum: Any = None, frame: Any = None) -> None:
    """The host's `SignalHandler.running_phase_sigquit_handler`, which ends the server; says first
    which process was ended from outside."""
    watchdog = self.tokenizer_manager._subprocess_watchdog
    for sentence in lost(watchdog) if watchdog is not None else ():
        logger.error("dsv4_plugin: %s", sentence)
    _end(self, signum, frame)


LOST_WORKER: Seam = attribute_seam(
    SignalHandler,
    "running_phase_sigquit_handler",
    end_for_a_lost_worker,
    why="a server that ends because a rank was killed says which one, and by what",
    remove="the host's watchdog names the process also when another one notices first",
    test="tests/host/test_lifetime.py",
)
