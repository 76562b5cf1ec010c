"""What an operator is: one signature, a torch reference that defines it, and implementations of the same signature.

Which implementation runs is decided once per static key (phase, layer kind, shape class) and then looked up; every
choice remembers why the others were not taken and how often it ran.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import device, flags

logger = logging.getLogger(__name__)

REFERENCE = "reference"
Requirement = Callable[..., "str | None"]
"""Takes the operator's arguments, returns why an implementation cannot run them, or None."""


class SelectionError(ValueError):
    """A forced implementation that cannot run."""


@dataclass
class _Place:
    """Where in the model the process is: set by the model, read by selection and the report."""

    phase: str = "prefill"
    layer: int = -1
    ratio: int = -1


HERE = _Place()


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator; `path` ("module:function") is imported when it is first chosen."""

    name: str
    path: str
    packages: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    """Prefixes of architectures it runs on; empty for all that have its packages."""
    requires: Requirement | None = None

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine whatever the arguments, or None."""
        for package in self.packages:
            if device.package_version(package) is None:
                return f"package {package} is not installed"
        arch = device.arch()
        if arch == device.CPU and not ("triton" in self.packages and device.interprets_triton()):
            return "there is no GPU"
        if self.archs and arch != device.CPU and not arch.startswith(self.archs):
            return f"{arch} is not one of {', '.join(self.archs)}"
        return None

    def load(self) -> Callable[..., Any]:
        module, _, function = self.path.partition(":")
        return getattr(importlib.import_module(module), function)


@dataclass
class Choice:
    """The implementation taken for one static key, the calls it served, and the reasons against the preferred ones."""

    implementation: str
    run: Callable[..., Any]
    rejected: dict[str, str] = field(default_factory=dict)
    fallback: bool = False
    """Whether an implementation that this machine offers was rejected for its arguments."""
    calls: int = 0


class Operator:
    """A callable operator. Calling it runs the implementation in use; `reference` is its definition."""

    def __init__(self, reference: Callable[..., Any]):
        self.name = reference.__name__
        self.reference = reference
        self.implementations: dict[str, Implementation] = {}
        self.choices: dict[tuple, Choice] = {}
        self._layers: frozenset[int] | None = None
        functools.update_wrapper(self, reference)
        OPERATORS[self.name] = self

    def add(self, implementation: Implementation) -> None:
        """Offers another implementation; those added first are preferred."""
        self.implementations[implementation.name] = implementation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0]
        inside = self._layers is None or HERE.layer in self._layers
        key = (HERE.phase, HERE.ratio, inside, x.dtype, x.device.type, x.shape[0].bit_length(), x.shape[1:])
        choice = self.choices.get(key)
        if choice is None:
            choice = self.choices[key] = self._choose(inside, args, kwargs)
        choice.calls += 1
        return choice.run(*args, **kwargs)

    def configure(self) -> None:
        """Reads the operator's flags anew and forgets earlier choices.

        Raises SelectionError when the forced implementation cannot run on this machine.
        """
        self.choices.clear()
        self._layers = flags.layers(self.name)
        forced = flags.implementation(self.name)
        if forced in ("auto", REFERENCE):
            return
        if forced not in self.implementations:
            known = ", ".join((REFERENCE, *self.implementations))
            raise SelectionError(f"{flags.operator_flag(self.name)}={forced}: {self.name} has no such implementation; "
                                 f"it has {known}")
        reason = self.implementations[forced].unavailable()
        if reason:
            raise SelectionError(f"{flags.operator_flag(self.name)}={forced} cannot run here: {reason}")

    def _choose(self, inside: bool, args: tuple, kwargs: dict) -> Choice:
        forced = flags.implementation(self.name) if inside else REFERENCE
        rejected: dict[str, str] = {}
        fallback = False
        for name, implementation in self.implementations.items():
            if forced not in ("auto", name):
                rejected[name] = f"{flags.operator_flag(self.name)}={forced}" if inside else "layer is excluded"
                continue
            reason = implementation.unavailable()
            if reason is None and forced == "auto" and device.arch() == device.CPU:
                reason = "interpreted kernels run only when forced"
            elif reason is None and implementation.requires and (reason := implementation.requires(*args, **kwargs)):
                fallback = True
            if reason is None:
                return Choice(name, implementation.load(), rejected)
            if forced == name:
                raise SelectionError(f"{flags.operator_flag(self.name)}={name} cannot run this call: {reason}")
            rejected[name] = reason
        if fallback:
            logger.warning("%s runs its reference in %s: %s", self.name, HERE.phase, rejected)
        return Choice(REFERENCE, self.reference, rejected, fallback)

    def __repr__(self) -> str:
        return f"<operator {self.name}>"


OPERATORS: dict[str, Operator] = {}


def operator(reference: Callable[..., Any]) -> Operator:
    """Makes an Operator of its torch reference."""
    return Operator(reference)


def configure() -> None:
    """Reads the flags of every operator. Raises SelectionError for a forced implementation that cannot run here."""
    for each in OPERATORS.values():
        each.configure()


def choices() -> Iterator[tuple[Operator, tuple, Choice]]:
    """Every choice made so far."""
    for each in OPERATORS.values():
        for key, choice in each.choices.items():
            yield each, key, choice
