"""Times whole steps of one rank's share of a released model on a GPU: eager, and replayed from a
graph.

    python benchmarks/step.py [--model pro] [--layout tp8] [--context 8192] [--batch 1,8,32,128]
                              [--prefill 2048,8192] [--profile] [--out FILE.json]

Two depths of the same model are timed, with random weights in the released form: the first layers
and some more. Their difference is what a layer takes, from which a step of the whole model is
reckoned; a GPU that has no room for the whole share is enough. Sums over ranks are left out. The
bytes that a layer must move, over the copy bandwidth of the same run, are what a time is held
against.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from kernel_environment import environment  # noqa: E402
from kernel_timing import Timer, Times  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from dsv4_plugin.cache import PAGE_TOKENS  # noqa: E402
from dsv4_plugin.checkpoint.released import load_geometry  # noqa: E402
from dsv4_plugin.config import Geometry  # noqa: E402
from dsv4_plugin.model import DeepseekV4  # noqa: E402
from dsv4_plugin.ops.operator import OPERATORS  # noqa: E402
from dsv4_plugin.parallel import Group, Parallel  # noqa: E402
from dsv4_plugin.roofline.hardware import Hardware  # noqa: E402
from dsv4_plugin.roofline.layout import Layout  # noqa: E402
from dsv4_plugin.roofline.step import decode_step, prefill_step  # noqa: E402
from dsv4_plugin.runtime import Engine  # noqa: E402

SHALLOW, DEEP = 2, 6
"""Layers of the two models: one pair of compress ratios, and three."""


@dataclass(frozen=True)
class Row:
    """One step, in microseconds unless its name says otherwise."""

    step: str
    eager: float
    """Of the deep model, launches included."""
    layer: float
    """Mean of a layer that compresses by 4 and one by 128: from graphs where they were captured."""
    floor: float
    """Of a layer: its bytes at the bandwidth of a copy."""
    model: float
    """All layers and what is outside of them, reckoned."""
    graph: bool
    times: dict[str, Any]
    kernels: list[dict[str, Any]]
    """Of the deep model."""

    @property
    def over_floor(self) -> float:
        return self.layer / self.floor


def cut(geometry: Geometry, layers: int) -> Geometry:
    """The model with `layers` layers that compress by 4 and 128 in turn, the first hash-routed."""
    return replace(
        geometry,
        num_hidden_layers=layers,
        compress_ratios=(4, 128) * (layers // 2),
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        dspark=None,
    )


def parallel(layout: Layout) -> Parallel:
    """The share of rank 0; its sums are its own part."""
    gpus = Group(size=layout.gpus)
    expert = Group(size=layout.ep), Group(size=layout.gpus // layout.ep)
    return Parallel(Group(size=layout.attention_tp), *expert, gpus, gpus)


def fill(model: DeepseekV4) -> None:
    """Random weights: results of each matrix are about as large as its inputs."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.int64:  # the table of a hash-routed layer
                parameter.data.random_(0, model.geometry.n_routed_experts)
            else:
                _fill(name, parameter.data, getattr(module, "weight", None))


def _fill(name: str, data: Tensor, weight: Tensor | None) -> None:
    raw = data.view(torch.uint8) if data.dtype.itemsize == 1 else data
    if data.dtype == torch.float8_e4m3fn:
        raw.random_(0, 0x70).bitwise_or_(torch.empty_like(raw).random_(0, 2).mul_(0x80))
    elif data.dtype == torch.int8:
        raw.random_(0, 256)
    elif data.dtype == torch.float8_e8m0fnu:  # codes of about 2^5 in FP8, of 2^2 in FP4
        fp4 = weight is not None and weight.dtype == torch.int8
        inputs = data.shape[-1] * (32 if fp4 else 128)
        middle = 127 - (2 if fp4 else 5) - round(math.log2(inputs) / 2)
        raw.random_(middle - 1, middle + 1)
    elif data.ndim == 1:
        data.fill_(1.0) if name == "weight" else data.normal_(0, 0.1)
    else:
        data.normal_(0, data.shape[-1] ** -0.5)


def fill_caches(engine: Engine, template: int = 64) -> None:
    """Random entries in every page; past `template` pages they repeat."""
    caches = engine.caches
    stores = [*caches.window.values(), *caches.compressed.values(), *caches.index.values()]
    for store in stores:
        pages = store.pages
        some = min(template, len(pages))
        slots = some * getattr(store, "slots_per_page", PAGE_TOKENS // 4)
        dim = 128 if store in caches.index.values() else 512
        values = torch.randn(slots, dim, device=pages.device)
        store.store(torch.arange(slots, device=pages.device), values)
        for start in range(some, len(pages), some):
            end = min(start + some, len(pages))
            pages[start:end].copy_(pages[: end - start])
    for ring in (*caches.ring.values(), *caches.index_ring.values()):
        ring.normal_()


class Bench:
    """Models of both depths on one GPU."""

    def __init__(self, name: str, layout: Layout, device: torch.device, profile: bool = False):
        self.geometry, self.layout, self.device = load_geometry(name), layout, device
        self.profile, self._kernels = profile, []
        self.timer = Timer(device)
        self.peaks = self.timer.peaks()
        deep = DeepseekV4(
            cut(self.geometry, DEEP), parallel=parallel(layout), device=device, parts="backbone"
        )
        fill(deep)
        self.models = {DEEP: deep}
        shallow = DeepseekV4(
            cut(self.geometry, SHALLOW), parallel=parallel(layout), device="meta", parts="backbone"
        )
        for part in ("embed", "head", "norm"):  # the same weights
            setattr(shallow, part, getattr(deep, part))
        shallow.layers = nn.ModuleList(deep.layers[:SHALLOW])
        for part in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
            setattr(shallow, part, getattr(deep, part))
        for ratio in (4, 128):
            setattr(shallow, f"frequencies_{ratio}", getattr(deep, f"frequencies_{ratio}"))
        self.models[SHALLOW] = shallow

    @torch.inference_mode()
    def decode(self, batch: int, context: int) -> Row:
        """A step of `batch` requests that hold `context` tokens after it."""
        times, self._kernels = {}, []
        for depth, model in self.models.items():
            engine = Engine(model, max_tokens=batch * (context + PAGE_TOKENS), max_requests=batch)
            fill_caches(engine)
            sequences = [engine.open() for _ in range(batch)]
            engine.reserve(sequences, context)
            for sequence in sequences:
                sequence.length = context - 1
            plan = engine.plan([(sequence, 1) for sequence in sequences], static=True)
            times[depth] = self._times(model, engine, plan, decode=True)
        least = decode_step(cut(self.geometry, DEEP), self._gpu, self.layout, batch, context)
        return self._row(f"decode {batch} x {context}", times, self._floor(least))

    @torch.inference_mode()
    def prefill(self, tokens: int) -> Row:
        """A chunk of one request from its first token on."""
        times, self._kernels = {}, []
        for depth, model in self.models.items():
            engine = Engine(model, max_tokens=tokens + PAGE_TOKENS, max_requests=1)
            plan = engine.plan([(engine.open(), tokens)])
            times[depth] = self._times(model, engine, plan, decode=False)
        least = prefill_step(cut(self.geometry, DEEP), self._gpu, self.layout, 1, tokens)
        return self._row(f"prefill {tokens}", times, self._floor(least))

    @property
    def _gpu(self) -> Hardware:
        """Whose sizes do not matter: only bytes and operations of its steps are read."""
        return Hardware.named("H200")

    def _floor(self, step: Any) -> float:
        """Microseconds of a layer: the larger of bytes and products, for each of its components."""
        rate = {"fp8": self.peaks.products("fp8"), "bf16": self.peaks.bf16}
        return (
            1e6
            / DEEP
            * sum(
                max(
                    part.bytes / self.peaks.copy,
                    sum(flop / rate.get(kind, rate["fp8"]) for kind, flop in part.flops.items()),
                )
                for part in step.components
                if part.name != "head"
            )
        )

    def _times(self, model: DeepseekV4, engine: Engine, plan: Any, decode: bool) -> Times:
        ids = torch.randint(0, self.geometry.vocab_size, plan.position.shape, device=self.device)
        ids %= model.embed.weight.shape[0]  # of this rank

        def run() -> Tensor:
            streams = model(ids, plan, engine.caches)
            rows = streams if decode else streams[-1:]
            return model.logits(model.collapse(rows))

        out = run()
        if not out.isfinite().all():
            raise SystemExit("step.py: error: logits are not finite; a time of them says nothing")
        if self.profile and model is self.models[DEEP]:
            self._kernels = profiled(run)
        return self.timer.times(run, capture=decode)

    def _row(self, step: str, times: dict[int, Times], floor: float) -> Row:
        best = {depth: (each.graph_warm or each.warm).median for depth, each in times.items()}
        layer = (best[DEEP] - best[SHALLOW]) / (DEEP - SHALLOW)
        whole = best[SHALLOW] + layer * (self.geometry.num_hidden_layers - SHALLOW)
        deep = times[DEEP]
        return Row(
            step,
            deep.warm.median,
            layer,
            floor,
            whole,
            deep.graph_warm is not None,
            {str(depth): asdict(each) for depth, each in times.items()},
            self._kernels,
        )


def profiled(run: Callable[[], object], most: int = 40) -> list[dict[str, Any]]:
    """Kernels of one call by the time they take together: name, launches, microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = [each for each in found.key_averages() if each.device_time_total]
    kernels.sort(key=lambda each: -each.device_time_total)
    return [
        {"kernel": each.key[:70], "launches": each.count, "us": each.device_time_total}
        for each in kernels[:most]
    ]


def counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def line(row: Row) -> str:
    captured = "graph" if row.graph else f"no graph: {row.times[str(DEEP)]['no_graph']}"
    return (
        f"{row.step}: {row.layer:.1f} us a layer, {row.over_floor:.2f}x floor {row.floor:.1f};"
        f" {DEEP} layers eager {row.eager / 1e3:.2f} ms; whole model {row.model / 1e3:.2f} ms"
        f" ({captured})"
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pro")
    parser.add_argument("--layout", type=Layout.parse, default=Layout.parse("tp8"))
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=counts, default=[1, 8, 32, 128])
    parser.add_argument("--prefill", type=counts, default=[2048, 8192])
    parser.add_argument("--profile", action="store_true", help="also say what each kernel takes")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        print(f"step.py: error: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    torch.manual_seed(0)
    bench = Bench(arguments.model, arguments.layout, device, arguments.profile)
    rows: list[Row] = []
    works: list[Callable[[], Row]] = [
        *(lambda b=b: bench.decode(b, arguments.context) for b in arguments.batch),
        *(lambda t=t: bench.prefill(t) for t in arguments.prefill),
    ]
    for work in works:
        rows.append(work())
        print(line(rows[-1]), flush=True)
        for kernel in rows[-1].kernels:
            print(f"  {kernel['us']:9.1f} us {kernel['launches']:4} x {kernel['kernel']}")
        torch.cuda.empty_cache()
    ran = {
        name: sorted({row.implementation for row in operator.rows()})
        for name, operator in OPERATORS.items()
        if operator.rows()
    }
    print("; ".join(f"{name} {', '.join(found)}" for name, found in ran.items()))
    if arguments.out:
        document = {
            "environment": environment(device),
            "model": arguments.model,
            "layout": arguments.layout.name,
            "peaks": asdict(bench.peaks),
            "implementations": ran,
            "rows": [asdict(row) | {"over_floor": row.over_floor} for row in rows],
        }
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
