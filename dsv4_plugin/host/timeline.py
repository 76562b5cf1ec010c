"""How long each part of this process's start took, from its creation to its first answer, and how
far its longest part, reading the weights, has come."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

import psutil
from torch import Tensor

logger = logging.getLogger(__name__)

INTERVAL = 10.0
"""Seconds between two lines about weights."""


class Timeline:
    """Seconds by part, in their order."""

    def __init__(self, began: float):
        self.seconds: dict[str, float] = {}
        self.ended = False
        self._last = began

    def end(self, part: str, last: bool = False) -> None:
        """Says that `part` ends now, which began where the one before it ended. After the last one
        nothing is added: weights can be loaded again while a server serves."""
        if self.ended:
            return
        now = time.time()
        self.seconds[part] = round(now - self._last, 2)
        self._last, self.ended = now, last

    def text(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())
        return f"{parts}; {sum(self.seconds.values()):.1f} s in all"


TIMELINE = Timeline(psutil.Process().create_time())
"""Of this process."""


def told(weights: Iterable[tuple[str, Tensor]], total: int) -> Iterator[tuple[str, Tensor]]:
    """The same weights, of `total` bytes; the log says how many have come and how fast."""
    started = said = time.monotonic()
    size = 0
    for name, tensor in weights:
        yield name, tensor
        size, now = size + tensor.nbytes, time.monotonic()
        if now - said >= INTERVAL:
            said = now
            logger.info(
                "dsv4_plugin: weights %3.0f %%, %.1f of %.1f GB, %.2f GB/s",
                100 * size / total,
                size / 1e9,
                total / 1e9,
                size / 1e9 / (now - started),
            )
    seconds = time.monotonic() - started
    logger.info(
        "dsv4_plugin: %.2f GB of weights read in %.1f s, %.2f GB/s",
        size / 1e9,
        seconds,
        size / 1e9 / seconds,
    )
