"""What an operator is: one signature, a torch reference that defines it, and implementations of the
same signature.

Which implementation runs is decided once per static key (phase, layer kind, shape class) and then
looked up; every choice remembers why the others were not taken and how often it ran. A second
dictionary finds the choice by what a call shows at no cost, exact shapes included, so that an eager
call pays well under a microsecond. Both are bounded: a server lives for months and meets every
shape.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import inspect
import logging
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .. import active, device, flags, measured
from ..active import ANY
from ..cache.step_plan import phase
from ..flags import AUTO, REFERENCE
from .compile_failure import compile_failure

logger = logging.getLogger(__name__)

Requirement = Callable[..., "str | None"]
"""Takes the operator's arguments, returns why an implementation cannot run them, or None.

It may look at what a static key holds, and at nothing else: the first tensor's dtype, device and
shape (its rows, and what the operator declares as `varying`, only to the power of two), the types
of the other arguments (None or not, dense or packed cache), and the values of those that are
declared as str, bool, torch.dtype or an Enum.
"""
_WORDS = (str, bool, torch.dtype, enum.Enum)
"""Types of arguments that are told apart by their value."""
_REMEMBERED = 4096
"""Calls of different shapes whose choice an operator finds at once; past that it starts over."""
_MOST_CHOICES = 512
"""Choices an operator keeps; past that their counts are added up without their shapes."""


class SelectionError(ValueError):
    """A forced implementation that cannot run."""


@dataclass(slots=True)
class _Place:
    """Where in the model the process is: set by the model, read by selection and the report."""

    phase: str = "prefill"
    layer: int = -1
    ratio: int = -1
    static: bool = False
    """Whether references keep to what a graph can hold, shapes that no data decides and no wait for
    the device; in a decode step they always do, captured or not."""


HERE = _Place()


def enter_step(max_queries: int, static: bool = False) -> None:
    """Says that a step begins whose requests have up to `max_queries` rows, with a `static` plan or
    not; what runs now is outside of layers."""
    HERE.phase, HERE.layer, HERE.ratio = phase(max_queries), -1, -1
    HERE.static = static or max_queries <= 1


@contextlib.contextmanager
def step_of_all(prefills: bool) -> Iterator[None]:
    """Around what works on the rows of all attention replicas: where any of them `prefills`, it is
    no decode step, whatever this process's own rows are."""
    before = HERE.phase, HERE.static
    if prefills:
        HERE.phase, HERE.static = "prefill", False
    try:
        yield
    finally:
        HERE.phase, HERE.static = before


_LAYER_KINDS = {-1: "model", 0: "window", 4: "c4", 128: "c128"}


class Key(NamedTuple):
    """What a choice depends on."""

    phase: str
    layer_kind: str
    """By compress ratio; "model" outside layers."""
    inside: bool
    """Whether the layer is among those that DSV4_LAYERS_<OPERATOR> names."""
    rows: str
    """Rows of the first tensor, as the range of its power of two."""
    tensor: str
    """Dtype, device and trailing shape of the first tensor, what varies as a range."""
    others: tuple
    """Types of the other arguments, values of strings, booleans and dtypes."""


def _range(count: int) -> str:
    """The range of numbers with the highest bit of `count`."""
    low = 1 << count.bit_length() >> 1
    return str(low) if low < 2 else f"{low}-{2 * low - 1}"


def _is_word(declared: Any) -> bool:
    """Whether an argument declared so may be one of _WORDS."""
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        return any(map(_is_word, typing.get_args(declared)))
    if typing.get_origin(declared) is typing.Literal:
        return True
    return isinstance(declared, type) and issubclass(declared, _WORDS)


@dataclass(frozen=True)
class Implementation:
    """One way to run an operator; `path` ("module:function") is imported when it is first chosen.

    One whose kernel does not compile is given up for the next one, which then runs the same call:
    what kernels before that one wrote must not change the result.
    """

    name: str
    path: str
    packages: tuple[str, ...] = ()
    """Distributions it needs; as "name==version" in that version alone."""
    archs: tuple[str, ...] = ()
    """Prefixes of architectures it runs on; empty for all that have its packages."""
    fp8: bool = False
    """Whether its kernels convert to or from FP8 e4m3, which not every GPU can."""
    requires: Requirement | None = None
    measured: bool = True
    """Whether it is known where it stands among the others. `auto` takes one of which it is not
    known only where `dsv4 verify --time` has found out."""

    prepare: str = ""
    """What makes, of weights as released, those that it reads, as "module:function"."""
    weights: tuple[int, int] = (0, 0)
    """The arguments from one place to another that `prepare` takes and makes."""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine whatever the arguments, or None."""
        for package in self.packages:
            name, _, wanted = package.partition("==")
            found = device.package_version(name)
            if found is None:
                return f"package {name} is not installed"
            if wanted and found != wanted:
                return f"package {name} is {found}, not {wanted} (pip install {package})"
        arch = device.arch()
        in_triton = self.packages == ("triton",)
        if arch == device.CPU and not (in_triton and device.interprets_triton()):
            return "there is no GPU" + (" (TRITON_INTERPRET=1 interprets it)" if in_triton else "")
        if self.archs and arch != device.CPU and not arch.startswith(self.archs):
            return f"{arch} is not one of {', '.join(self.archs)}"
        return device.lacks_fp8() if self.fp8 else None

    def load(self) -> Callable[..., Any]:
        return _imported(self.path)

    def with_prepared(self, arguments: tuple) -> tuple:
        """Arguments of the operator with weights as this implementation reads them. Raises
        ValueError where it cannot take them."""
        if not self.prepare:
            return arguments
        begin, end = self.weights
        made = _imported(self.prepare)(*arguments[begin:end])
        return *arguments[:begin], *made, *arguments[end:]


def _imported(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


@dataclass
class Choice:
    """The implementation taken for one static key, the calls it served, and the reasons against the
    preferred ones."""

    implementation: str
    run: Callable[..., Any]
    rejected: dict[str, str] = field(default_factory=dict)
    fallback: bool = False
    """Whether an implementation that this machine offers was rejected: for its arguments, in favour
    of the reference, or because it does not compile."""
    calls: int = 0


class Operator:
    """A callable operator. Calling it runs the implementation in use; `reference` is its
    definition.

    `varying` are the dimensions of the first tensor, beside its rows, that change from step to
    step, such as the length of a context: a choice holds for a range of them.
    """

    def __init__(self, reference: Callable[..., Any], varying: tuple[int, ...] = ()):
        self.name = reference.__name__
        self.reference = reference
        self.varying = varying
        self.implementations: dict[str, Implementation] = {}
        self.choices: dict[Key, Choice] = {}
        self._past: dict[tuple, active.Row] = {}
        self._said: set[tuple] = set()
        self._given_up: dict[str, str] = {}
        """Why implementations that this machine offers could not be built, by name."""
        self._found: dict[tuple, Choice] = {}
        self._layers: frozenset[int] | None = None
        self._forced = flags.Setting(AUTO)
        self._order: dict[str, list[str]] = {}
        """Implementations whose times on this machine are known, by phase, the fastest first."""
        declared = typing.get_type_hints(reference)
        self._by_value = tuple(
            at
            for at, name in enumerate(inspect.signature(reference).parameters)
            if _is_word(declared.get(name))
        )
        functools.update_wrapper(self, reference)
        OPERATORS[self.name] = self

    def add(self, implementation: Implementation) -> None:
        """Offers another implementation; those added first are preferred."""
        self.implementations[implementation.name] = implementation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        inside = self._layers is None or HERE.layer in self._layers
        key = (HERE.phase, HERE.ratio, inside, x.dtype, x.is_cuda, x.shape, *map(type, args))
        if kwargs or self._by_value:
            key += (
                *kwargs,
                *map(_kind, kwargs.values()),
                *[args[at] for at in self._by_value if at < len(args)],
            )
        choice = self._found.get(key)
        if choice is None:
            choice = self._find(key, x, inside, args, kwargs)
        choice.calls += 1
        try:
            return choice.run(*args, **kwargs)
        except Exception as error:
            reason = compile_failure(error)
            if reason is None or choice.implementation == REFERENCE:
                raise
            choice.calls -= 1
            self._give_up(choice.implementation, reason, error)
        return self(*args, **kwargs)

    def offers_kernel(self) -> bool:
        """Whether the flags and this machine leave an implementation other than the reference."""
        wanted = flags.implementation(self.name).value
        return any(
            wanted in (AUTO, name) and implementation.unavailable() is None
            for name, implementation in self.implementations.items()
        )

    def configure(self) -> None:
        """Reads the operator's flags anew and forgets earlier choices.

        Raises SelectionError when the implementation asked for cannot run on this machine.
        """
        self._layers, self._forced = flags.layers(self.name), flags.implementation(self.name)
        self._order = measured.order(self.name)
        self.forget()
        reason = self._unable()
        if reason and self._forced.yields:
            logger.warning("dsv4_plugin: %s: %s; auto decides", self._asked(), reason)
            self._forced = flags.Setting(AUTO, self._forced.source)
        elif reason:
            raise SelectionError(f"{self._asked()} cannot run here: {reason}")

    def _unable(self) -> str | None:
        """Why the implementation that the flags ask for cannot run on this machine, or None."""
        wanted = self._forced.value
        if wanted in (AUTO, REFERENCE):
            return None
        if reason := self.implementations[wanted].unavailable():
            return reason
        try:
            self.implementations[wanted].load()
        except (ImportError, AttributeError) as error:
            return f"it cannot be loaded: {error}"
        return None

    @property
    def named(self) -> bool:
        """Whether an implementation was asked for by name, and must run."""
        return self._forced.value not in (AUTO, REFERENCE) and not self._forced.yields

    def prepared(self, layer: int, *weights: Any) -> tuple[Any, ...] | None:
        """`weights` of `layer` as the implementation that was asked for reads them; None where it
        reads them as released, or where a profile asked and it cannot take them. Raises
        SelectionError where one that was named cannot."""
        wanted = self.implementations.get(self._forced.value)
        inside = self._layers is None or layer in self._layers
        if wanted is None or not wanted.prepare or not inside:
            return None
        try:
            return _imported(wanted.prepare)(*weights)
        except ValueError as error:
            reason = f"{self._asked()} cannot run layer {layer}: {error}"
            if not self._forced.yields:
                raise SelectionError(reason) from error
            self._say((wanted.name, str(error)), f"{reason}; auto decides")
            return None

    def forget(self) -> None:
        """Drops all choices and what was counted."""
        for each in (self.choices, self._found, self._past, self._said, self._given_up):
            each.clear()

    def _give_up(self, name: str, reason: str, error: Exception) -> None:
        """Takes no more calls to an implementation that does not compile here; raises
        SelectionError when it was asked for by name."""
        reason = f"it does not compile for {device.arch()}: {reason}"
        if self.named and self._forced.value == name:
            raise SelectionError(f"{self._asked()} cannot run {self.name}: {reason}") from error
        self._given_up[name] = reason
        self._say((name,), f"{self.name} goes on without {name}: {reason}")
        self._fold(lambda choice: choice.implementation == name, with_shapes=True)

    def _asked(self) -> str:
        """The flag that chose the implementation, with what set it where that is another
        variable."""
        asked = f"{flags.operator_flag(self.name)}={self._forced.value}"
        return asked if self._forced.source == asked else f"{asked} (from {self._forced.source})"

    def _find(self, found: tuple, x: Any, inside: bool, args: tuple, kwargs: dict) -> Choice:
        """The choice for a call not seen before, which `found` will find from now on."""
        others = (
            *map(_kind, args[1:] if args else ()),
            *((name, _kind(value)) for name, value in kwargs.items()),
        )
        sizes = (
            _range(size) if at in self.varying else str(size)
            for at, size in enumerate(x.shape[1:], 1)
        )
        tensor = " x".join((str(x.dtype).removeprefix("torch."), *sizes))
        key = Key(
            HERE.phase,
            _LAYER_KINDS.get(HERE.ratio, str(HERE.ratio)),
            inside,
            _range(x.shape[0]),
            f"{tensor} on {'gpu' if x.is_cuda else x.device.type}",
            others,
        )
        choice = self.choices.get(key)
        if choice is None:
            if len(self.choices) >= _MOST_CHOICES:
                self._start_over()
            choice = self.choices[key] = self._choose(inside, x, args, kwargs)
        if _OBSERVERS:
            return Choice(choice.implementation, functools.partial(_OBSERVERS[-1], self, choice))
        if len(self._found) >= _REMEMBERED:
            self._found.clear()
        self._found[found] = choice
        return choice

    def _start_over(self) -> None:
        """Drops all choices; what they served stays counted, without its shapes."""
        self._say(
            (),
            f"{self.name} met {_MOST_CHOICES} kinds of calls and starts choosing anew; the report"
            " counts the earlier ones without their shapes",
        )
        self._fold(lambda choice: True, with_shapes=False)

    def _fold(self, ended: Callable[[Choice], bool], with_shapes: bool) -> None:
        """Drops the choices that ended, and keeps what they served."""
        for row in self._counted(ended):
            if not with_shapes:
                row.rows = row.tensor = ANY
            if len(self._past) >= _MOST_CHOICES:
                row.rejected = dict.fromkeys(row.rejected, "one of many reasons")
            _add(row, self._past)
        self.choices = {key: choice for key, choice in self.choices.items() if not ended(choice)}
        self._found.clear()

    def _counted(self, which: Callable[[Choice], bool]) -> Iterator[active.Row]:
        for key, choice in list(self.choices.items()):
            if choice.calls and which(choice):
                yield active.Row(
                    self.name,
                    key.phase,
                    key.layer_kind,
                    key.rows,
                    key.tensor,
                    choice.implementation,
                    choice.calls,
                    choice.rejected,
                    choice.fallback,
                )

    def _say(self, what: tuple, message: str) -> None:
        """Logs a message that is new to this operator."""
        if what not in self._said:
            self._said.add(what)
            logger.warning("dsv4_plugin: %s", message)

    def rows(self) -> list[active.Row]:
        """What was chosen and ran; keys that differ in nothing a reader sees are one row."""
        shown: dict[tuple, active.Row] = {}
        for row in (*map(replace, list(self._past.values())), *self._counted(lambda _: True)):
            _add(row, shown)
        return list(shown.values())

    def _choose(self, inside: bool, x: Any, args: tuple, kwargs: dict) -> Choice:
        wanted = self._forced.value if inside else REFERENCE
        rejected: dict[str, str] = {}
        fallback = False
        for name in self._preferred():
            implementation = self.implementations[name]
            if wanted not in (AUTO, name):
                rejected[name] = (
                    self._asked()
                    if inside
                    else f"{flags.layers_flag(self.name)} leaves this layer out"
                )
                continue
            reason, offered = self._against(implementation, wanted, x, args, kwargs)
            if reason is None:
                try:
                    run = implementation.load()
                    return Choice(name, run, rejected, any(n in self._given_up for n in rejected))
                except (ImportError, AttributeError) as error:  # a package of another version
                    reason = self._given_up[name] = f"it cannot be loaded: {error}"
            if wanted == name and not self._forced.yields:
                raise SelectionError(
                    f"{self._asked()} cannot run this call of {self.name}: {reason}"
                )
            fallback |= offered
            rejected[name] = reason
        if fallback:
            self._say(
                (HERE.phase, *rejected.items()),
                f"{self.name} runs its reference in {HERE.phase}: {rejected}",
            )
        return Choice(REFERENCE, self.reference, rejected, fallback)

    def _preferred(self) -> list[str]:
        """Names of the implementations, those first that `auto` tries first: measured here by their
        times, then in the order in which they were added."""
        order = self._order.get(HERE.phase, [])
        known = [name for name in order if name in self.implementations]
        return known + [name for name in self.implementations if name not in known]

    def _against(
        self, implementation: Implementation, wanted: str, x: Any, args: tuple, kwargs: dict
    ) -> tuple[str | None, bool]:
        """Why an implementation cannot take a call, or None; and whether this machine offers it all
        the same."""
        if implementation.name in self._given_up:
            return self._given_up[implementation.name], True
        reason = implementation.unavailable()
        if reason is None and wanted == AUTO and device.arch() == device.CPU:
            reason = "interpreted kernels run only when named"
        elif reason is None and not x.is_cuda and device.arch() != device.CPU:
            reason = "the tensors are not on the GPU"
        if reason is not None:
            return reason, False
        if wanted == AUTO and not implementation.measured:
            if implementation.name not in self._order.get(HERE.phase, ()):
                return "its speed is not known here; dsv4 verify --time measures it", False
        if implementation.requires is None:
            return None, True
        return implementation.requires(*args, **kwargs), True

    def __repr__(self) -> str:
        return f"<operator {self.name}>"


def _kind(value: Any) -> Any:
    return value if isinstance(value, _WORDS) else type(value).__name__


class Calls:
    """The calls that one captured graph holds; what it replays, Python does not see."""

    def __init__(self):
        self._choices: list[tuple[Choice, int]] = []

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Notes the calls that are made while it lasts, in place of those it noted before, and
        takes them back: they serve nobody."""
        before = {id(choice): choice.calls for choice in self._every()}
        yield
        self._choices = []
        for choice in self._every():
            made = choice.calls - before.get(id(choice), 0)
            if made:
                self._choices.append((choice, made))
                choice.calls -= made

    def add(self) -> None:
        """Counts them once more: the graph is replayed."""
        for choice, made in self._choices:
            choice.calls += made

    @staticmethod
    def _every() -> list[Choice]:
        return [choice for each in OPERATORS.values() for choice in each.choices.values()]


OPERATORS: dict[str, Operator] = {}
flags.registered = lambda name: tuple(OPERATORS[name].implementations) if name in OPERATORS else ()


def operator(reference: Callable[..., Any] | None = None, *, varying: tuple[int, ...] = ()) -> Any:
    """Makes an Operator of its torch reference; as `@operator(varying=(1,))` with dimensions that
    vary."""
    if reference is None:
        return functools.partial(Operator, varying=varying)
    return Operator(reference, varying)


def configure() -> None:
    """Reads the flags of every operator. Raises SelectionError for a forced implementation that
    cannot run here."""
    if why := measured.read()[1]:
        logger.warning("dsv4_plugin: %s", why)
    for each in OPERATORS.values():
        each.configure()


def forget() -> None:
    """Drops the choices and the counts of every operator, not what its flags ask for."""
    for each in OPERATORS.values():
        each.forget()


Observer = Callable[..., Any]
"""Called as observer(operator, choice, *args, **kwargs) in place of the choice; returns the
operator's result."""
_OBSERVERS: list[Observer] = []


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """While it lasts, `observer` runs every operator call, to check or record it; calls are not
    counted."""
    for each in OPERATORS.values():
        each._found.clear()
    _OBSERVERS.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.pop()


def report_rows() -> list[active.Row]:
    """What was chosen and ran so far."""
    return [row for each in OPERATORS.values() for row in each.rows()]


def _add(row: active.Row, rows: dict[tuple, active.Row]) -> None:
    """Puts `row` among `rows`, or its calls on the one that looks the same."""
    same = rows.setdefault((*row.place, row.implementation, *row.rejected.items()), row)
    if same is not row:
        same.calls += row.calls
