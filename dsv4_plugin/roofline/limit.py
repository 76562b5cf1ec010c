"""The best possible curve: what a closed loop of users could reach at most, from the lower bounds
of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import Geometry
from ..report.pareto import Frontier
from .hardware import Hardware
from .layout import Layout, LayoutError
from .memory import largest_batch
from .speculation import Speculation, speculation
from .step import Efficiency, Step, decode_step, prefill_step

RANGE_RATIO = 0.8
"""The client draws each length uniformly from [0.8, 1] of the nominal one, so means are 0.9 of it
(docs/report.md)."""

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Workload:
    """Mean tokens in and out of one request."""

    isl: float
    osl: float

    @classmethod
    def nominal(cls, isl: int, osl: int, range_ratio: float = RANGE_RATIO) -> Workload:
        return cls(isl * (1 + range_ratio) / 2, osl * (1 + range_ratio) / 2)


@dataclass(frozen=True)
class LimitPoint:
    """One concurrency of a closed loop on one layout. Times in seconds."""

    concurrency: int
    layout: Layout
    workload: Workload
    decode: Step
    prompt: Step
    prompts_together: int
    speculation: Speculation | None = None
    """In the place of `decode`, where the draft is used."""

    @property
    def decode_seconds(self) -> float:
        """Of one token of every user."""
        return self.speculation.seconds if self.speculation else self.decode.seconds

    @property
    def prefill_seconds(self) -> float:
        """Time that one prompt costs the node, its attention groups each taking one at once."""
        return self.prompt.seconds / self.prompts_together / self.prompt.efficiency.prefill

    @property
    def cycle(self) -> float:
        """From one request's start to the next of the same user: every user's prompt and one
        request's decode steps.

        Decode stands still while a prompt runs, as it does in a server that does not mix the two,
        and the batch is otherwise always full.
        """
        return self.concurrency * self.prefill_seconds + self.workload.osl * self.decode_seconds

    @property
    def tpot(self) -> float:
        ttft = self.prefill_seconds * self.prompts_together
        return (self.cycle - ttft) / self.workload.osl

    @property
    def intvty(self) -> float:
        return 1 / self.tpot

    @property
    def tput_per_gpu(self) -> float:
        tokens = self.concurrency * (self.workload.isl + self.workload.osl)
        return tokens / self.cycle / self.layout.gpus


def limit_point(
    geometry: Geometry,
    hardware: Hardware,
    layout: Layout,
    concurrency: int,
    workload: Workload,
    efficiency: Efficiency = Efficiency(),
    index_dtype: str = "fp8",
    accepted_length: float | None = None,
) -> LimitPoint:
    """With `accepted_length` the model's DSpark draft is used, and gives that many tokens a
    verification. Raises LayoutError for a layout that does not fit the model."""
    together = min(concurrency, layout.dp)
    context = round(workload.isl + workload.osl / 2)
    decode = decode_step(geometry, hardware, layout, concurrency, context, index_dtype).under(
        efficiency
    )
    # An assumed launch cost is for decode: prefill's kernels are long enough to hide the next one's
    # launch.
    prompt = prefill_step(geometry, hardware, layout, together, round(workload.isl), index_dtype)
    prompt = prompt.under(replace(efficiency, launch=None))
    drafted = None
    if accepted_length is not None:
        drafted = speculation(
            geometry, hardware, layout, concurrency, context, accepted_length, index_dtype
        ).under(efficiency)
    return LimitPoint(concurrency, layout, workload, decode, prompt, together, drafted)


def limit_points(
    geometry: Geometry,
    hardware: Hardware,
    layouts: Sequence[Layout],
    workload: Workload,
    concurrencies: Sequence[int] = CONCURRENCIES,
    efficiency: Efficiency = Efficiency(),
    index_dtype: str = "fp8",
    accepted_length: float | None = None,
) -> list[LimitPoint]:
    """Points of every layout at every concurrency whose caches fit beside the weights."""
    points = []
    for layout in layouts:
        room = largest_batch(
            geometry,
            hardware,
            layout,
            round(workload.isl + workload.osl),
            index_dtype,
            draft=accepted_length is not None,
        )
        points += [
            limit_point(
                geometry,
                hardware,
                layout,
                concurrency,
                workload,
                efficiency,
                index_dtype,
                accepted_length,
            )
            for concurrency in concurrencies
            if concurrency <= room
        ]
    return points


def limit_frontier(points: Sequence[LimitPoint]) -> Frontier:
    """Raises LayoutError when nothing fits."""
    if not points:
        raise LayoutError(
            "no concurrency fits: the weights alone fill the memory of this layout; use more GPUs"
        )
    return Frontier.of([point.intvty for point in points], [point.tput_per_gpu for point in points])
