"""Every implementation that can run here against its reference, and the whole model against itself.

What `dsv4 verify` runs before anybody trusts a new image.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import flags, measured
from ..checkpoint.load import load_checkpoint
from ..checkpoint.tiny import tiny_config, write_tiny
from ..config import Geometry, Precision
from ..device import arch
from ..flags import REFERENCE
from ..model import DeepseekV4
from ..ops import operator as selection
from ..ops.operator import OPERATORS, Implementation, Operator
from .cases import MODELS, Case, cases, sizes
from .compare import Tolerance, bound, error, errors, outcome, tolerance
from .elsewhere import Elsewhere
from .engine import Engine
from .ranks import GROUPS, Run, try_ranks


@dataclass(frozen=True)
class Result:
    """One check."""

    subject: str
    """Operator, or "model"."""
    implementation: str
    case: str
    error: float
    tolerance: Tolerance
    seconds: float | None = None
    reference_seconds: float | None = None
    note: str = ""
    phase: str = ""
    """Of a graph's replay, whose seconds are the kernels' alone."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance.limit


@dataclass(frozen=True)
class Skipped:
    """An implementation that cannot run here, and why."""

    subject: str
    implementation: str
    reason: str


def verify_operators(
    names: list[str], device: torch.device, quick: bool, seed: int
) -> Iterator[Result | Skipped]:
    """Checks every implementation of the operators `names` with fresh data of `seed`, and on a GPU
    every reference, which may serve there too."""
    if device.type != "cpu":
        yield from verify_references(names, device, seed)
    for name in names:
        for implementation in OPERATORS[name].implementations.values():
            reason = implementation.unavailable()
            if reason:
                yield Skipped(name, implementation.name, reason)
                continue
            yield from verify_implementation(OPERATORS[name], implementation, device, quick, seed)


def verify_references(names: list[str], device: torch.device, seed: int) -> Iterator[Result]:
    """Checks every reference of the operators `names` on `device` against itself on the CPU, with
    the same data, at sizes that a CPU can do."""
    cpu = torch.device("cpu")
    for name in names:
        operator = OPERATORS[name]
        for size in sizes(MODELS[0], cpu, quick=True):
            for case in cases(name, size, device, seed):
                there = case.arguments()
                here = Elsewhere(cpu)(there)
                allowed, label = tolerance(name, there[0].dtype), f"{case.label}, beside the CPU's"
                try:
                    got, want = (
                        outcome(operator, operator.reference(*each), bound(operator, each, {}))
                        for each in (there, here)
                    )
                    found = {part: error(got[part].cpu(), want[part]) for part in want}
                    worst, wrong = max(found.values(), default=0.0), ""
                except Exception as failure:  # as for kernels: the other checks still have to run
                    worst, wrong = float("inf"), f"{type(failure).__name__}: {failure}"
                yield Result(name, REFERENCE, label, worst, allowed, note=wrong)


def verify_implementation(
    operator: Operator, implementation: Implementation, device: torch.device, quick: bool, seed: int
) -> Iterator[Result | Skipped]:
    """Checks one that can run on `device`, with fresh data of `seed`."""
    for model in MODELS[:1] if quick else MODELS:
        for size in sizes(model, device, quick):
            for case in cases(operator.name, size, device, seed):
                yield from _verify_case(operator, implementation, case, device)


def _verify_case(
    operator: Operator, implementation: Implementation, case: Case, device: torch.device
) -> Iterator[Result | Skipped]:
    try:
        arguments = implementation.with_prepared(case.arguments())
    except ValueError as unfit:
        yield Skipped(operator.name, implementation.name, f"{case.label}: {unfit}")
        return
    if implementation.prepare:
        released = case
        case = replace(case, arguments=lambda: implementation.with_prepared(released.arguments()))
    if implementation.requires and (reason := implementation.requires(*arguments)):
        yield Skipped(operator.name, implementation.name, f"{case.label}: {reason}")
        return
    allowed = tolerance(operator.name, arguments[0].dtype)
    try:
        run = implementation.load()
        _, found = errors(operator, run, arguments, {})
        seconds, reference = (
            _seconds(each, case.arguments(), device) for each in (run, operator.reference)
        )
        yield Result(
            operator.name,
            implementation.name,
            case.label,
            max(found.values(), default=0.0),
            allowed,
            seconds,
            reference,
            ", ".join(name for name, each in found.items() if each > allowed.limit),
        )
        if device.type == "cuda":
            yield _replayed(operator, run, case, implementation.name)
    except Exception as failure:  # a kernel may fail in any way; the other checks still have to run
        yield Result(
            operator.name,
            implementation.name,
            case.label,
            float("inf"),
            allowed,
            note=(
                f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
            ),
        )


def _seconds(run: Callable, arguments: tuple, device: torch.device) -> float:
    """Best of some runs, the first not counted; on a CPU, where kernels are interpreted, one
    run."""
    times = []
    for _ in range(1 if device.type == "cpu" else 20):
        start = time.perf_counter()
        run(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:] or times)


def _replayed(operator: Operator, run: Callable, case: Case, name: str) -> Result:
    """A graph's replay against the eager call: the same bits. Its seconds are of one replay."""
    eager, captured = case.arguments(), case.arguments()
    want = outcome(operator, run(*eager), bound(operator, eager, {}))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(*captured)
    graph.replay()
    torch.cuda.synchronize()
    got = outcome(operator, result, bound(operator, captured, {}))
    same = all(torch.equal(got[key].nan_to_num(), want[key].nan_to_num()) for key in want)
    return Result(
        operator.name,
        name,
        f"{case.label}, graph replay",
        0.0 if same else float("inf"),
        Tolerance(0.0, "a replay runs the same kernels on the same data: equal bits"),
        _replay_seconds(graph),
        phase=case.phase,
    )


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Best of some runs of ten replays in a row, of each."""
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e4)  # milliseconds of ten
    return min(times)


def implementation_seconds(results: Iterable[Result | Skipped]) -> measured.Seconds:
    """Seconds by operator, phase and implementation, added up over the calls that all
    implementations of the operator took; none of an implementation that was wrong anywhere."""
    checks = [result for result in results if isinstance(result, Result)]
    wrong = {(each.subject, each.implementation) for each in checks if not each.passed}
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for each in checks:
        if each.phase and each.seconds and (each.subject, each.implementation) not in wrong:
            cases = found.setdefault((each.subject, each.phase), {})
            cases.setdefault(each.implementation, {})[each.case] = each.seconds
    seconds: measured.Seconds = {}
    for (operator, phase), implementations in found.items():
        common = set.intersection(*(set(times) for times in implementations.values()))
        if common:
            seconds.setdefault(operator, {})[phase] = {
                name: sum(times[case] for case in common) for name, times in implementations.items()
            }
    return seconds


# more than 128 + 256 would add nothing; unaligned to windows of 4 and 128 and to a page of 256
PROMPT = 333
NEW_TOKENS = 12

SERVING = Tolerance(
    0.1, "bf16 over six layers, where a reordered rounding may change one selected entry of 64"
)
SAME_MODEL = Tolerance(2e-3, "fp32 throughout; sums of other lengths order their terms differently")


def verify_model(device: torch.device, seed: int) -> Iterator[Result]:
    """A tiny checkpoint through the runtime, with the implementations in use.

    exact: a prompt in one chunk, in ragged chunks and token by token must give the same logits.
    serving: what the chosen implementations give against all references on the same weights.
    """
    with tempfile.TemporaryDirectory(prefix="dsv4-verify-") as directory:
        path = Path(directory) / "tiny"
        write_tiny(path, tiny_config(hidden=256), seed=seed)
        prompt = torch.randint(
            300, (PROMPT,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        exact = _engine(path, Precision.EXACT, device)
        with references():
            whole = exact.score(prompt)
            ragged = exact.score(prompt, [1, 6, 121, 128, 70, *[1] * 7])
            new = exact.generate([prompt], NEW_TOKENS, chunk=100)[0]
            again = exact.score(prompt + new)[len(prompt) - 1 : -1].argmax(-1).tolist()
        yield Result(
            "model",
            "reference",
            "exact: chunks against one prefill",
            error(ragged, whole),
            SAME_MODEL,
        )
        yield Result(
            "model",
            "reference",
            f"exact: {NEW_TOKENS} decoded tokens against their prefill",
            0.0 if new == again else float("inf"),
            Tolerance(0.0, "the same tokens"),
        )
        serving = _engine(path, Precision.SERVING, device)
        start = time.perf_counter()
        chosen = serving.score(prompt)
        seconds = time.perf_counter() - start
        with references():
            start = time.perf_counter()
            want = serving.score(prompt)
            reference_seconds = time.perf_counter() - start
        yield Result(
            "model",
            "in use",
            "serving: implementations in use against references",
            error(chosen, want),
            SERVING,
            seconds,
            reference_seconds,
        )


def verify_ranks(size: int, device: torch.device, seed: int) -> Iterator[Result]:
    """Whether `size` ranks of a tiny model, whose choices are close calls, go on with the same
    experts and entries, as DSV4_CHOICES says and with noise in one rank's last bits."""
    choices = flags.read("DSV4_CHOICES")
    runs = Run(choices), Run(choices, noisy=True)
    for layout in GROUPS:
        for run, outcomes in zip(runs, try_ranks(size, layout, device, seed, runs), strict=True):
            first = outcomes[0]
            held = first.compared and not any(outcome.uneven for outcome in outcomes)
            yield Result(
                "ranks",
                f"choices={choices}",
                f"{size}, {layout}{', noise in one' if run.noisy else ''}: choices in force",
                0.0 if held else float("inf"),
                Tolerance(0.0, "ranks that chose differently would add slices of other experts"),
                note=f"{first.uneven} of {first.compared} differ",
            )


def _engine(path: Path, precision: Precision, device: torch.device) -> Engine:
    model = DeepseekV4(Geometry.from_dir(path), precision, device=device, parts="backbone")
    load_checkpoint(model, path)
    return Engine(model, max_tokens=1024, max_requests=2)


def references():
    """While it lasts, every operator runs its reference."""
    return selection.observed(
        lambda operator, choice, *args, **kwargs: operator.reference(*args, **kwargs)
    )


def machine() -> torch.device:
    """The device that is verified."""
    return torch.device("cpu" if arch() == "cpu" else "cuda")
