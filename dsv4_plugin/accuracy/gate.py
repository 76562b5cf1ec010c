"""The accuracy gate: what a trained checkpoint computes in a setting, against margins and the exact
references."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import flags, installation
from ..config import Geometry, Precision
from ..spelling import suggestion
from .eval_set import (
    NORMAL,
    EvalSet,
    EvalSize,
    Measured,
    Proportion,
    accepted_length,
    build_eval_set,
    divergence,
    divergence_of_things,
    measure,
)
from .score import Difference, EvalError, Score, difference

if TYPE_CHECKING:
    import torch

    from ..runtime import Engine

TRAINED_LENGTH = 4096
"""Tokens of the longest sequences that the shipped checkpoint learned from
(examples/train_tiny)."""
WINDOW = 128
"""Tokens of the sliding window: what was told nearer needs no compressed entry."""


@dataclass(frozen=True)
class Margin:
    """What a setting may cost, and why that much."""

    limit: float
    why: str


MARGINS = {
    "recall": Margin(
        0.95,
        "learned to be always right at these distances: a miss in twenty is the share that training"
        " itself may leave",
    ),
    "recall beyond": Margin(
        0.80,
        "twice the length it was trained on: what generalises there may be less, a broken path is"
        " near 1 in 64",
    ),
    "loss": Margin(
        0.02,
        "nats per token above exact; roundings scatter both ways and nearly cancel, a wrong"
        " operator does not",
    ),
    "divergence": Margin(
        0.004,
        "nats per token from exact's predictions; a wrong operator moves them even where the text's"
        " loss stays. FP8 activations, which it did not learn with, cost 0.0025 on an H100",
    ),
    "divergence of things": Margin(
        0.05,
        "nats from exact's predictions of what was told; a thing that is still right, but less"
        " surely, shows here",
    ),
    "acceptance": Margin(
        0.05,
        "below exact; a draft costs speed, never a wrong token, but a broken MTP block accepts"
        " nearly nothing",
    ),
    "accepted length": Margin(
        0.15,
        "tokens per verification below exact, at the same places; rounding tips single drafts, a"
        " broken DSpark draft loses what it had above 1",
    ),
}
"""`recall` at distances that were trained, `recall beyond` at longer ones; the others are
differences to exact."""


@dataclass(frozen=True)
class Setting:
    """A precision and the DSV4_* and foreign variables that choose implementations."""

    name: str
    precision: Precision
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One measure of one setting."""

    setting: str
    measure: str
    value: float
    low: float
    high: float
    """95 % interval."""
    count: int
    """Trials, or tokens."""
    least: float | None = None
    most: float | None = None
    why: str = ""

    @property
    def passed(self) -> bool:
        """Whether it keeps its margin; what is no number does not."""
        return (self.least is None or self.value >= self.least) and (
            self.most is None or self.value <= self.most
        )


@dataclass(frozen=True)
class Outcome:
    """One setting's rows, and the implementations of each operator that ran."""

    setting: Setting
    ran: Mapping[str, Sequence[str]]
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def kernels(self) -> str:
        """What ran beside the references."""
        chosen = {
            name: [each for each in ran if each != flags.REFERENCE]
            for name, ran in self.ran.items()
        }
        return (
            ", ".join(f"{name} {'/'.join(each)}" for name, each in chosen.items() if each)
            or "references"
        )

    def document(self) -> dict[str, Any]:
        return {
            "setting": self.setting.name,
            "precision": self.setting.precision.value,
            "environment": dict(self.setting.environment),
            "ran": {name: list(each) for name, each in self.ran.items()},
            "passed": self.passed,
            "rows": [asdict(row) | {"passed": row.passed} for row in self.rows],
        }


def checkpoint_directory() -> Path:
    """Where the trained tiny checkpoint is."""
    return installation.directory("checkpoints/tiny")


def draft_directory(directory: Path) -> Path | None:
    """Where the checkpoint in `directory` lies with a DSpark draft in the place of its MTP block;
    None where it does not."""
    beside = directory.with_name(directory.name + "-dspark")
    return beside if (beside / "config.json").is_file() else None


def _chooses(name: str) -> bool:
    """Whether a variable takes part in the choice of implementations."""
    operators = {
        of(operator)
        for operator in flags.OPERATORS
        for of in (flags.operator_flag, flags.layers_flag)
    }
    return name in operators | {"DSV4_PROFILE", flags.ADOPTED} | set(flags.foreign_flags())


REFERENCES = {"DSV4_PROFILE": "safe"}
"""The environment of the references."""


def chosen(
    environ: Mapping[str, str], profile: str | None = None, operators: Sequence[str] = ()
) -> dict[str, str]:
    """The variables of `environ` that choose implementations, with `profile` and `operators`
    ("sparse_mla=triton") on top.

    Raises FlagError for what flags do not take, EvalError for an operator that does not exist.
    """
    environment = {name: value for name, value in environ.items() if _chooses(name)}
    if profile is not None:
        environment["DSV4_PROFILE"] = profile
    for word in operators:
        operator, equals, implementation = word.partition("=")
        if not equals:
            raise EvalError(
                f"--operators {word}: write OPERATOR=IMPLEMENTATION, such as sparse_mla=triton"
            )
        if operator not in flags.OPERATORS:
            raise EvalError(
                f"--operators {word}: there is no operator {operator!r};"
                f" {suggestion(operator, flags.OPERATORS)}"
            )
        environment[flags.operator_flag(operator)] = implementation
    flags.check(environment)
    return environment


def settings(
    precisions: Sequence[str | Precision], environment: Mapping[str, str], gpu: bool
) -> list[Setting]:
    """A setting for each of `precisions` under `environment`; none where it would be the exact
    references over again.

    Those are always measured, as what all others are compared with. Without a GPU auto takes
    references.
    """
    asked = {flags.implementation(operator, environment).value for operator in flags.OPERATORS}
    plain = asked <= ({flags.REFERENCE} if gpu else {flags.REFERENCE, flags.AUTO})
    return [
        Setting(Precision(each).value, Precision(each), environment)
        for each in precisions
        if not (plain and Precision(each) is Precision.EXACT)
    ]


@contextlib.contextmanager
def selected(environment: Mapping[str, str]) -> Iterator[None]:
    """While it lasts, `environment` alone chooses implementations. Raises SelectionError for one
    that cannot run here."""
    from ..ops import operator as selection

    before = {name: value for name, value in os.environ.items() if _chooses(name)}
    try:
        _replace(before, environment)
        selection.configure()
        yield
    finally:
        _replace(environment, before)
        # Without this, the process would keep on with the choices of `environment`.
        for operator in selection.OPERATORS.values():
            with contextlib.suppress(selection.SelectionError):
                operator.configure()


def _replace(old: Mapping[str, str], new: Mapping[str, str]) -> None:
    for name in old:
        os.environ.pop(name, None)
    os.environ.update(new)


def load_engine(
    directory: Path, precision: Precision, device: torch.device | str, max_tokens: int
) -> Engine:
    """An engine of one sequence on the checkpoint in `directory`. Raises CheckpointError or
    ConfigError."""
    from ..checkpoint.load import load_checkpoint
    from ..model import DeepseekV4
    from ..runtime import Engine

    geometry = Geometry.from_dir(directory)
    model = DeepseekV4(geometry, precision, device=device)
    load_checkpoint(model, directory)
    rows = geometry.dspark.block_size + 1 if geometry.dspark else 1
    return Engine(model, max_tokens=max_tokens + rows, max_requests=1, verify_rows=rows)


def run_gate(
    directory: Path,
    wanted: Sequence[Setting],
    size: EvalSize,
    device: torch.device,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """The outcome of the exact references and then of every setting of `wanted`, judged against
    them.

    Raises what a wrong checkpoint, eval set or choice of implementations raises, choices before
    anything is computed.
    """
    for setting in wanted:
        with selected(setting.environment):
            pass
    eval_set = build_eval_set(directory, Geometry.from_dir(directory).bos_token_id, size)
    reference, outcomes = None, []
    for setting in (Setting("exact, references", Precision.EXACT, REFERENCES), *wanted):
        measured, ran = _measured(directory, setting, eval_set, device)
        outcomes.append(
            Outcome(
                setting,
                ran,
                tuple(judge(setting.name, measured, reference, eval_set.bytes_per_token)),
            )
        )
        reference = reference or measured
        progress(outcomes[-1])
    return outcomes


def _measured(
    directory: Path, setting: Setting, eval_set: EvalSet, device: torch.device
) -> tuple[Measured, dict[str, list[str]]]:
    from ..ops import operator as selection

    with selected(setting.environment):
        measured = measure(
            load_engine(directory, setting.precision, device, eval_set.longest), eval_set
        )
        draft = draft_directory(directory)
        if draft is not None and measured.accepted_length is None:
            engine = load_engine(draft, setting.precision, device, eval_set.longest)
            measured = replace(measured, accepted_length=accepted_length(engine, eval_set))
        ran: dict[str, list[str]] = {}
        for row in selection.report_rows():
            if row.implementation not in ran.setdefault(row.operator, []):
                ran[row.operator].append(row.implementation)
        return measured, ran


def judge(
    setting: str, measured: Measured, reference: Measured | None, bytes_per_token: float = 1.0
) -> Iterator[Row]:
    """The rows of one setting against MARGINS; without a `reference`, which is the exact one, only
    recall has a margin."""
    for distance, share in measured.recall.items():
        margin = MARGINS["recall" if distance <= TRAINED_LENGTH else "recall beyond"]
        yield _share(setting, f"recall, {_spelled(distance)}", share, margin.limit, margin.why)
        if reference is not None and distance <= TRAINED_LENGTH:
            moved = divergence_of_things(measured, reference, distance)
            yield _nats(
                setting,
                f"divergence of things, {_spelled(distance)}",
                moved,
                share.count,
                MARGINS["divergence of things"],
            )
    tokens = measured.tokens
    yield _nats(setting, "loss, nats per token", measured.loss, tokens)
    yield _nats(setting, "loss, nats per byte", measured.loss, tokens, scale=1 / bytes_per_token)
    if reference is not None:
        yield _nats(
            setting,
            "loss above exact",
            difference(measured.loss, reference.loss),
            tokens,
            MARGINS["loss"],
        )
        yield _nats(
            setting,
            "divergence from exact",
            divergence(measured, reference),
            tokens,
            MARGINS["divergence"],
        )
    if measured.acceptance is not None:
        least, margin = None, MARGINS["acceptance"]
        if reference is not None:
            least = reference.acceptance.value - margin.limit
        yield _share(
            setting, "drafts accepted", measured.acceptance, least, margin.why if reference else ""
        )
    if measured.accepted_length is not None:
        yield _accepted_length(setting, measured.accepted_length, reference)


def _accepted_length(setting: str, found: Score, reference: Measured | None) -> Row:
    margin = MARGINS["accepted length"]
    half, count = NORMAL * (found.stderr or 0.0), len(found.items)
    row = Row(setting, "accepted length", found.mean, found.mean - half, found.mean + half, count)
    if reference is None:
        return row
    difference(found, reference.accepted_length)  # refuses other places
    return replace(row, least=reference.accepted_length.mean - margin.limit, why=margin.why)


def _nats(
    setting: str,
    measure: str,
    found: Score | Difference,
    tokens: int,
    margin: Margin | None = None,
    scale: float = 1.0,
) -> Row:
    half = NORMAL * (found.stderr or 0.0)
    value, low, high = (scale * nats for nats in (found.mean, found.mean - half, found.mean + half))
    return Row(
        setting,
        measure,
        value,
        low,
        high,
        tokens,
        most=margin.limit if margin else None,
        why=margin.why if margin else "",
    )


def _share(setting: str, measure: str, share: Proportion, least: float | None, why: str) -> Row:
    return Row(setting, measure, share.value, *share.interval, share.count, least=least, why=why)


def _spelled(distance: int) -> str:
    """A distance as a user writes it."""
    if distance < WINDOW:
        return "window"
    return f"{distance // 1024}k" if distance % 1024 == 0 else str(distance)
