"""Measured points and the dated curves they form: the published tables and result files in
InferenceX's shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from .pareto import Frontier

PUBLISHED = Path(__file__).with_name("published")
_ROUNDING = 0.02
"""Share by which rates of input and output may miss their total and still be rates of the same
GPUs."""
_REQUIRED = ("conc", "tput_per_gpu", "isl", "osl")


class ResultError(ValueError):
    """A result file that cannot be read as a measurement."""


@dataclass(frozen=True)
class Point:
    """One measured run. Throughputs are tokens per second per GPU, `intvty` tokens per second per
    user."""

    concurrency: int
    tput_per_gpu: float
    intvty: float
    input_tput_per_gpu: float
    output_tput_per_gpu: float
    tpot_ms: float | None = None
    layout: str = ""
    source: str = ""
    goodput: dict[str, float] = field(default_factory=dict)
    """Requests per second that kept a service level, by its name; empty where nobody counted."""
    note: str = ""
    """What a reader must know of this point: runs that differ, warnings of the benchmark."""


@dataclass(frozen=True)
class Curve:
    """The points of one configuration over concurrency, at one workload."""

    label: str
    points: tuple[Point, ...]
    hardware: str
    gpus: int
    isl: int
    osl: int
    date: str = ""
    framework: str = ""
    precision: str = ""
    model: str = ""
    published: bool = False
    notes: tuple[str, ...] = ()

    @property
    def column(self) -> str:
        """Its name in tables: the date of a published curve, the label of an own one."""
        return self.date if self.published else self.label

    @property
    def workload(self) -> str:
        return f"{self.isl}/{self.osl}"

    @cached_property
    def frontier(self) -> Frontier:
        return Frontier.of([p.intvty for p in self.points], [p.tput_per_gpu for p in self.points])

    @property
    def peak(self) -> Point:
        """Its point of highest throughput per GPU."""
        return max(self.points, key=lambda point: point.tput_per_gpu)

    @property
    def most_interactive(self) -> Point:
        return max(self.points, key=lambda point: point.intvty)


@dataclass(frozen=True)
class PublishedTable:
    """An article's curves, with the figures it derived from them, to check ours against."""

    source: str
    curves: tuple[Curve, ...]
    iso_levels: tuple[float, ...]
    iso_cells: dict[str, dict[float, float | None]]
    """date -> tokens per second per user -> tokens per second per GPU, None where the article has
    no figure"""
    iso_gains: dict[float, float]
    headline: dict[str, float]
    unprinted: str = ""
    """Which points the article must have used for `iso_cells` beyond those it prints."""
    quoted: dict[str, Any] = field(default_factory=dict)


def load_published(path: Path = PUBLISHED / "mi355x-sglang-2026-05.yaml") -> PublishedTable:
    """The article tables that ship with this package (docs/report.md says where they come from)."""
    document = yaml.safe_load(path.read_text())
    isl, osl = document["isl"], document["osl"]
    curves = tuple(
        Curve(
            label=f"{entry['date']} {entry['name']}",
            date=str(entry["date"]),
            precision=entry["precision"],
            hardware=document["hardware"],
            gpus=document["gpus"],
            isl=isl,
            osl=osl,
            framework=document["framework"],
            model=document["model"],
            published=True,
            points=tuple(
                _published_point(dict(zip(document["columns"], row)), isl, osl, document["source"])
                for row in entry["points"]
            ),
        )
        for entry in document["curves"]
    )
    iso = document["iso_interactivity"]
    dates = [str(column) for column in iso["columns"][1:]]
    return PublishedTable(
        source=document["source"],
        curves=curves,
        iso_levels=tuple(row[0] for row in iso["rows"]),
        iso_cells={
            date: {row[0]: row[1 + index] for row in iso["rows"]}
            for index, date in enumerate(dates)
        },
        iso_gains=iso["gain_05_02_to_05_21"],
        headline=document["headline"],
        unprinted=document["unprinted"],
        quoted=document["quoted"],
    )


def load_other_stacks() -> list[dict[str, Any]]:
    """Entries of published/other-stacks.yaml, each point a mapping by column name."""
    document = yaml.safe_load((PUBLISHED / "other-stacks.yaml").read_text())
    return [
        {**entry, "points": [dict(zip(document["columns"], row)) for row in entry["points"]]}
        for entry in document["entries"]
    ]


def _published_point(row: dict[str, Any], isl: int, osl: int, source: str) -> Point:
    # The article prints the total alone; a closed loop reads isl and writes osl tokens per request.
    total = float(row["tput_per_gpu"])
    return Point(
        row["concurrency"],
        total,
        float(row["intvty"]),
        total * isl / (isl + osl),
        total * osl / (isl + osl),
        float(row["tpot_ms"]),
        row["layout"],
        source,
    )


def origin(curves: Sequence[Curve]) -> str:
    """Whose measurements the curves are, in a sentence."""
    published = [curve for curve in curves if curve.published]
    own = [curve.column for curve in curves if not curve.published]
    others = (
        f"published by others ({published[0].framework}, {published[0].date} to"
        f" {published[-1].date}), not measured with this package"
        if published
        else ""
    )
    if not own:
        return f"All curves are {others}."
    mine = f"{', '.join(own)}: from the result files given"
    return f"{mine}; the others are {others}." if published else f"{mine}."


def throughput_unit(curves: Sequence[Curve]) -> str:
    """Of a GPU, unless no curve has one."""
    return "tokens/s" if all(curve.hardware == "CPU" for curve in curves) else "tokens/s/GPU"


def load_results(paths: Iterable[Path]) -> tuple[list[Curve], list[Path]]:
    """Curves of result files, and the JSON files in given directories that hold no result.

    A path is a JSON file (one result or a list), a JSON Lines file, or a directory searched for
    *.json and *.jsonl. Results with the same label (or hardware, framework, precision, speculation
    and date), model, scenario and workload form one curve. Raises ResultError naming the file and
    the field.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    passed_over: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ResultError(
                f"{path} does not exist; give result files or directories that hold them"
            )
        files = sorted(path.rglob("*.json*")) if path.is_dir() else [path]
        for file in files:
            results = _read(file)
            if path.is_dir() and not any("tput_per_gpu" in result for result in results):
                passed_over.append(file)
                continue
            for result in results:
                _check(result, file)
                groups.setdefault(_key(result), []).append({**result, "_file": str(file)})
    if not groups:
        raise ResultError(
            f"no result found in {', '.join(map(str, paths))}; a result is a JSON object with"
            f" {', '.join(_REQUIRED)}"
        )
    return [_curve(results) for results in groups.values()], passed_over


def _read(file: Path) -> list[dict[str, Any]]:
    text = file.read_text()
    try:
        if file.suffix == ".jsonl":
            document = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ResultError(f"{file} is not valid JSON: {error}") from None
    results = document if isinstance(document, list) else [document]
    return [result for result in results if isinstance(result, dict)]


def _check(result: dict[str, Any], file: Path) -> None:
    missing = [name for name in _REQUIRED if not isinstance(result.get(name), (int, float))]
    if not any(
        isinstance(result.get(name), (int, float)) for name in ("median_intvty", "median_tpot")
    ):
        missing.append("median_intvty")
    if missing:
        raise ResultError(
            f"{file}: {', '.join(missing)} missing or not a number; results have InferenceX's shape"
            " (docs/report.md)"
        )
    for name in ("tput_per_gpu", "median_intvty", "median_tpot"):
        if name in result and not result[name] > 0:
            raise ResultError(
                f"{file}: {name} is {result[name]}; a run that produced nothing is no point of a"
                " curve"
            )


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    configuration = result.get("label") or tuple(
        str(result.get(name, ""))
        for name in ("date", "hw", "framework", "precision", "spec_decoding")
    )
    return configuration, result.get("model", ""), _scenario(result), result["isl"], result["osl"]


def _scenario(result: dict[str, Any]) -> str:
    """How requests arrived where it was no closed loop, which is what results without the field
    are."""
    scenario = str(result.get("scenario", ""))
    return "" if scenario == "closed loop" else scenario


def _curve(results: Sequence[dict[str, Any]]) -> Curve:
    first = results[0]
    spec = str(first.get("spec_decoding", "none"))
    words = [str(first.get(name, "")) for name in ("date", "hw", "framework", "precision")]
    if spec.lower() not in ("", "none", "false"):
        words.append(spec)
    label = str(first.get("label") or " ".join(word for word in words if word))
    hardware = str(first.get("hw", "unknown"))
    return Curve(
        label=" ".join(word for word in (label, _scenario(first)) if word),
        points=tuple(
            sorted((_point(result) for result in results), key=lambda p: (p.layout, p.concurrency))
        ),
        hardware=hardware.split("-")[0].upper(),
        gpus=_gpus(first),
        isl=int(first["isl"]),
        osl=int(first["osl"]),
        date=str(first.get("date", "")),
        framework=str(first.get("framework", "")),
        precision=str(first.get("precision", "")),
        model=str(first.get("model", "")),
    )


def _gpus(result: dict[str, Any]) -> int:
    return int(result.get("num_gpus") or int(result.get("tp", 1)) * int(result.get("pp", 1)))


def _point(result: dict[str, Any]) -> Point:
    total, isl, osl = float(result["tput_per_gpu"]), result["isl"], result["osl"]
    intvty = float(result.get("median_intvty") or 1 / result["median_tpot"])
    read, written = (
        float(result.get(name, 0)) for name in ("input_tput_per_gpu", "output_tput_per_gpu")
    )
    # Rows of disaggregated servers divide tokens read by the GPUs of prefill and tokens written by
    # those of decode: such rates are not of one GPU, and do not add up to the total.
    if abs(read + written - total) > _ROUNDING * total:
        read, written = (total * part / (isl + osl) for part in (isl, osl))
    return Point(
        concurrency=int(result["conc"]),
        tput_per_gpu=total,
        intvty=intvty,
        input_tput_per_gpu=read,
        output_tput_per_gpu=written,
        tpot_ms=1000 * float(result["median_tpot"]) if "median_tpot" in result else 1000 / intvty,
        layout=_layout(result),
        source=result["_file"],
        goodput=result.get("goodput") or {},
        note=_note(result),
    )


def _note(result: dict[str, Any]) -> str:
    spread = result.get("spread")
    words = (
        [f"{result['repeat']} runs within {100 * spread:.1f} %"]
        if isinstance(spread, (int, float)) and "repeat" in result
        else []
    )
    if result.get("unstable"):
        words.append("UNSTABLE")
    return "; ".join([*words, *map(str, result.get("warnings") or ())])


def _layout(result: dict[str, Any]) -> str:
    tp = int(result.get("tp", 1))
    attention = str(result.get("dp_attention", "false")).lower() == "true"
    name = f"dp{tp}" if attention else f"tp{tp}"
    return f"{name}-ep{result['ep']}" if int(result.get("ep", 1)) > 1 else name
