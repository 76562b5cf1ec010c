"""What a seam is, which of them this process took, and whether they hold.

SGLang swallows a plugin's exceptions and logs a missing hook target: a plugin that did not load
looks exactly like the stock server. So each seam says how it is verified, and `verify` is called
where the process depends on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .. import flags
from .version import SUPPORTED

logger = logging.getLogger(__name__)


class LedgerError(RuntimeError):
    """Seams that were taken but do not hold."""


@dataclass(frozen=True)
class Seam:
    """One reach into the host: `value` is what we put there."""

    target: str
    why: str
    remove: str
    """What the host must offer for this record to go."""
    test: str
    value: Any
    """Kept here and not looked up by name: the host's hooks rewrite every module's name of what
    they replace."""
    take: Callable[[Any], object]
    found: Callable[[], Iterable[Any]]
    """What the host has there now."""
    versions: str = str(SUPPORTED)

    def holds(self) -> bool:
        return any(found is self.value for found in self.found())


def attribute_seam(owner: Any, name: str, value: Any, why: str, remove: str, test: str) -> Seam:
    """The seam that puts `value` in place of the attribute `name` of a class or module of the
    host."""
    where = (
        owner.__name__
        if isinstance(owner, ModuleType)
        else (f"{owner.__module__}.{owner.__qualname__}")
    )
    return Seam(
        target=f"{where}.{name}",
        why=why,
        remove=remove,
        test=test,
        value=value,
        take=lambda value: setattr(owner, name, value),
        found=lambda: [getattr(owner, name)],
    )


_TAKEN: list[Seam] = []


def take(seams: Iterable[Seam]) -> None:
    """Takes seams; they belong to this process from now on."""
    for seam in seams:
        seam.take(seam.value)
        _TAKEN.append(seam)


def take_once(seams: Iterable[Seam]) -> None:
    """Takes those of `seams` that this process has not taken yet."""
    have = {seam.target for seam in _TAKEN}
    take([seam for seam in seams if seam.target not in have])


def taken() -> tuple[Seam, ...]:
    """The seams of this process."""
    return tuple(_TAKEN)


def verify(where: str) -> None:
    """Checks by identity that every seam of this process holds.

    One that does not, for example because another plugin took it later, is logged as an error; with
    DSV4_STRICT=1 it raises LedgerError. `where` says in the message at what point this was found.
    """
    unmet = [seam for seam in _TAKEN if not seam.holds()]
    if not unmet:
        return
    message = f"dsv4_plugin: {where}, {len(unmet)} of its seams do not hold: " + "; ".join(
        f"{seam.target} ({seam.why})" for seam in unmet
    )
    if flags.enabled("DSV4_STRICT"):
        raise LedgerError(message)
    logger.error(message)
