"""Checks and times the kernels of the attention path on a GPU, with torch, Triton and numpy alone.

    python benchmarks/kernels.py [operator ...] [--model pro-tp8] [--quick] [--time-limit 600]
                                 [--out FILE.json]
    python benchmarks/kernels.py --check-only           # no times
    python benchmarks/kernels.py --markdown FILE.json   # the table of a result
    TRITON_INTERPRET=1 python benchmarks/kernels.py --check-only  # no GPU: small, interpreted

Every call is first compared with the plain torch reference; one that is wrong is not timed, and the
exit status is 1. What a time is held against is measured in the same run: a large copy and large
matrix products (benchmarks/floors.py counts).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402

RESULTS = Path(__file__).parent / "results"
_ROOM = 0.9  # of the free memory: allocators round up and fragment


class UsageError(ValueError):
    """What was asked for cannot be done here."""


@dataclass
class Report:
    """What a run did."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="kernels.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("operators", nargs="*", help="only these (default: all)")
    found.add_argument(
        "--model", action="append", help="only this rank's share; may be repeated (default: all)"
    )
    found.add_argument("--quick", action="store_true", help="a small subset of the shapes")
    found.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="start no case after this time, and say which were left out",
    )
    found.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="skip what needs more (default: what is free on the device)",
    )
    found.add_argument(
        "--check-only", action="store_true", help="compare with the references, take no times"
    )
    found.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="default: benchmarks/results/kernels-DEVICE.json where times were taken",
    )
    found.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE.json",
        help="print the table of a result, run nothing",
    )
    found.add_argument("--seed", type=int, default=0, help="of the random data (default: 0)")
    return found


def where(check_only: bool) -> torch.device:
    """The device to run on. Raises UsageError when it is not one for what was asked."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.cuda.is_available():
        if interpreted:
            raise UsageError(
                "TRITON_INTERPRET=1 interprets kernels on the CPU, but there is a GPU; unset it"
            )
        return torch.device("cuda")
    if not interpreted:
        raise UsageError(
            f"torch {torch.__version__} sees no GPU; run this on a machine with one, or compare the"
            " kernels interpreted on this CPU: TRITON_INTERPRET=1 python benchmarks/kernels.py"
            " --check-only"
        )
    if not check_only:
        raise UsageError("interpreted kernels have no times worth taking; add --check-only")
    return torch.device("cpu")


def chosen(wanted: list[str], known: tuple[str, ...], kind: str) -> list[str]:
    """`wanted`, or all that are known. Raises UsageError for one that is not."""
    for name in wanted:
        if name not in known:
            raise UsageError(f"there is no {kind} {name!r}; there are {', '.join(known)}")
    return [name for name in known if name in wanted] if wanted else list(known)


def free_memory(device: torch.device) -> float:
    """Bytes that may be taken on the device."""
    if device.type == "cuda":
        return _ROOM * torch.cuda.mem_get_info(device)[0]
    return _ROOM * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Bench:
    """One run over many cases."""

    def __init__(self, device: torch.device, check_only: bool, memory: float | None = None):
        from kernel_timing import Timer

        self.device, self.report, self._memory = device, Report(), memory
        self.timer = None if check_only else Timer(device)
        self.peaks = self.timer.peaks() if self.timer else None

    def case(self, case: Any) -> None:
        """Checks and times one case, or says why not."""
        room = self._memory if self._memory is not None else free_memory(self.device)
        if case.memory > room:
            return self._skip(
                case, f"needs {case.memory / 1e9:.3g} GB, {room / 1e9:.3g} GB may be taken"
            )
        try:
            call = case.make(self.device)
        except torch.OutOfMemoryError:
            return self._skip(
                case, f"out of memory, though only {case.memory / 1e9:.3g} GB were expected"
            )
        for name, implementation in call.operator.implementations.items():
            if reason := implementation.unavailable() or (
                implementation.requires and implementation.requires(*call.arguments)
            ):
                self._skip(case, reason, name)
            else:
                self._run(case, call, name, implementation.load())

    def _run(self, case: Any, call: Any, name: str, run: Any) -> None:
        from kernel_check import check

        try:
            found, wanted = check(call, run)
        except torch.OutOfMemoryError:
            return self._skip(case, "out of memory while it was compared with the reference", name)
        except Exception as failure:  # a kernel may fail in any way; the others still have to run
            if "illegal memory access" in str(failure):
                raise  # nothing that follows on this device can be trusted
            return self._wrong(
                case, name, f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
            )
        if not found.passed:
            return self._wrong(
                case,
                name,
                f"{found.note}: error {found.error:.2e}, allowed {found.limit:.0e} ({found.why})",
            )
        row = {
            "operator": case.operator,
            "implementation": name,
            "model": case.model,
            "case": case.label,
            "check": asdict(found),
            "floor": asdict(call.floor),
        }
        if self.timer:
            times = self.timer.times(lambda: run(*call.arguments))
            row |= {"times": asdict(times)} | rates(times.best_cold.median, call.floor, self.peaks)
        if self.device.type == "cuda" or case.operator == "topk_select":
            row["peers"] = self._peers(case, call, wanted, row)
        self.report.rows.append(row)
        print(line(row), flush=True)

    def _peers(self, case: Any, call: Any, wanted: Any, row: dict) -> list[dict[str, Any]]:
        from kernel_check import check_peer
        from kernel_peers import Absent, peers

        found = []
        for peer in peers(call, case.label.startswith("decode")):
            if isinstance(peer, Absent):
                found.append({"name": peer.name, "absent": peer.reason})
                continue
            try:
                seen = check_peer(call, peer, wanted)
                if not seen.passed:
                    found.append(
                        {
                            "name": peer.name,
                            "absent": (
                                f"differs from the reference: error {seen.error:.2e}, "
                                f"allowed {seen.limit:.0e}"
                            ),
                        }
                    )
                    continue
                entry = {"name": peer.name, "note": peer.note}
                if self.timer:
                    times = self.timer.times(peer.run)
                    entry |= {"times": asdict(times), "ratio": times.best_cold.median / row["us"]}
                found.append(entry)
            except Exception as failure:  # a foreign kernel that fails is absent, not our failure
                found.append(
                    {
                        "name": peer.name,
                        "absent": (
                            f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
                        ),
                    }
                )
        return found

    def _skip(self, case: Any, reason: str, implementation: str = "") -> None:
        entry = {
            "operator": case.operator,
            "implementation": implementation,
            "case": case.label,
            "reason": reason,
        }
        self.report.skipped.append(entry)
        print(
            f"{' '.join(filter(None, (case.operator, implementation)))}, {case.label}: skipped,"
            f" {reason}",
            flush=True,
        )

    def _wrong(self, case: Any, implementation: str, reason: str) -> None:
        self.report.wrong.append(
            {
                "operator": case.operator,
                "implementation": implementation,
                "case": case.label,
                "reason": reason,
            }
        )
        print(
            f"{case.operator} {implementation}, {case.label}: WRONG, not timed; {reason}",
            flush=True,
        )


def rates(us: float, floor: Any, peaks: Any) -> dict[str, Any]:
    """What `us` microseconds mean: rates, the bound, the share of it that was reached, and time
    over the least time."""
    seconds, peak = us / 1e6, peaks.products(floor.products)
    least = floor.seconds(peaks.copy, peak)
    return {
        "us": us,
        "gb_s": floor.bytes / seconds / 1e9,
        "tflop_s": floor.operations / seconds / 1e12,
        "bound": floor.bound(peaks.copy, peak),
        "of_bound": least / seconds,
        "over_floor": seconds / least,
    }


def _half_spread(times: dict[str, float]) -> str:
    return f"±{50 * (times['high'] - times['low']) / times['median']:.0f}%"


def line(row: dict[str, Any]) -> str:
    """A row as it is printed while the run goes on."""
    head = f"{row['operator']} {row['implementation']}, {row['model']}, {row['case']}: "
    tail = "".join(
        f"; {peer['name']} "
        + (
            f"absent: {peer['absent']}"
            if "absent" in peer
            else f"{peer['ratio']:.2f}x ours"
            if "ratio" in peer
            else "agrees"
        )
        for peer in row.get("peers", ())
    )
    if "times" not in row:
        return (
            f"{head}right, error {row['check']['error']:.1e} of {row['check']['limit']:.0e} over"
            f" {row['check']['rows']} rows{tail}"
        )
    times = row["times"]
    cold, warm = times["graph_cold"] or times["cold"], times["graph_warm"] or times["warm"]
    return (
        f"{head}{row['us']:.1f} us cold {_half_spread(cold)}, {warm['median']:.1f} warm,"
        f" {times['warm']['median']:.1f} with launches; {row['gb_s']:.0f} GB/s,"
        f" {row['tflop_s']:.1f} TFLOP/s, {row['of_bound']:.0%} of {row['bound']},"
        f" {row['over_floor']:.2f}x floor{tail}"
    )


def run(arguments: argparse.Namespace) -> int:
    device = where(arguments.check_only)
    import kernel_cases

    from dsv4_plugin.host import kernels  # noqa: F401  all operators' implementations

    operators = chosen(arguments.operators, kernel_cases.NAMES, "operator")
    models = chosen(arguments.model or [], tuple(kernel_cases.MODELS), "model")
    sizes = (
        kernel_cases.TINY
        if device.type == "cpu"
        else kernel_cases.QUICK
        if arguments.quick
        else kernel_cases.FULL
    )
    torch.manual_seed(arguments.seed)
    start = time.monotonic()
    bench = Bench(
        device, arguments.check_only, None if arguments.memory is None else arguments.memory * 1e9
    )
    report, environment = bench.report, _environment(device)
    print(
        f"{environment['device']} ({environment['arch']}), torch {environment['torch']}, triton"
        f" {environment['triton']}"
        + ("; interpreted, small shapes" if device.type == "cpu" else "")
    )
    if bench.peaks:
        print(
            f"copy {bench.peaks.copy / 1e9:.0f} GB/s, bf16 product {bench.peaks.bf16 / 1e12:.0f}"
            " TFLOP/s, FP8 product "
            + (
                f"{bench.peaks.fp8 / 1e12:.0f} TFLOP/s"
                if bench.peaks.fp8
                else "not measured: held against bf16"
            )
        )
    for case in kernel_cases.cases(operators, models, sizes):
        if arguments.time_limit is not None and time.monotonic() - start > arguments.time_limit:
            report.left_out.append(f"{case.operator}, {case.label}")
            continue
        bench.case(case)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _conclude(report, time.monotonic() - start)
    timed = any("times" in row for row in report.rows)
    out = arguments.out or (
        RESULTS / f"kernels-{_file_name(environment['device'])}.json" if timed else None
    )
    if out and report.rows:
        options = {
            "operators": operators,
            "models": models,
            "quick": arguments.quick,
            "check_only": arguments.check_only,
            "time_limit": arguments.time_limit,
            "seed": arguments.seed,
        }
        peaks = {"peaks": asdict(bench.peaks)} if bench.peaks else {}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps(
                {"environment": environment, "options": options} | peaks | asdict(report), indent=1
            )
            + "\n"
        )
        print(f"written to {out}")
    return 1 if report.wrong else 0


def _conclude(report: Report, seconds: float) -> None:
    whys = {(row["operator"], row["check"]["limit"], row["check"]["why"]) for row in report.rows}
    for operator, limit, why in sorted(whys):
        print(f"{operator} may be off by {limit:.0e}: {why}")
    if report.left_out:
        print(
            f"left out when the time was up, {len(report.left_out)} cases:",
            *report.left_out,
            sep="\n  ",
        )
    print(
        f"{len(report.rows)} right, {len(report.wrong)} wrong, {len(report.skipped)} skipped,"
        f" {len(report.left_out)} left out, {seconds:.0f} s"
    )
    for each in report.wrong:
        print(
            f"error: {each['operator']} {each['implementation']}, {each['case']}: {each['reason']}",
            file=sys.stderr,
        )


def _file_name(device: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in device.lower()).strip("-")


def _environment(device: torch.device) -> dict[str, Any]:
    from kernel_environment import environment

    return environment(device)


def markdown(result: dict[str, Any]) -> str:
    """The rows of a result as a markdown table, under the lines that say where it was measured."""
    where_, peaks = result["environment"], result.get("peaks")
    if not peaks:
        raise UsageError("this result holds checks and no times")
    lines = [
        f"{where_['device']} ({where_['arch']}), {where_['driver']}, torch {where_['torch']},"
        f" Triton {where_['triton']}, dsv4_plugin {where_['dsv4_plugin']} at {where_['commit']},"
        f" {where_['date']}. Copy {peaks['copy'] / 1e9:.0f} GB/s, bf16 product"
        f" {peaks['bf16'] / 1e12:.0f} TFLOP/s"
        + (f", FP8 product {peaks['fp8'] / 1e12:.0f} TFLOP/s." if peaks["fp8"] else "."),
        "",
        (
            "| operator | kernel | share | call | µs cold | µs warm | µs with launches | GB/s |"
            " TFLOP/s | of bound | × floor | peers |"
        ),
        "|---" * 12 + "|",
    ]
    for row in result["rows"]:
        times = row["times"]
        cold, warm = times["graph_cold"] or times["cold"], times["graph_warm"] or times["warm"]
        others = ", ".join(
            f"{peer['name']} {peer['ratio']:.2f}×"
            for peer in row.get("peers", ())
            if "ratio" in peer
        )
        lines.append(
            f"| {row['operator']} | {row['implementation']} | {row['model']} | {row['case']} |"
            f" {row['us']:.1f} {_half_spread(cold)} | {warm['median']:.1f} |"
            f" {times['warm']['median']:.1f} | {row['gb_s']:.0f} | {row['tflop_s']:.1f} |"
            f" {row['of_bound']:.0%} {row['bound']} | {row['over_floor']:.2f} | {others or '–'} |"
        )
    lines += [f"\nLeft out: {len(result['left_out'])} cases."] if result["left_out"] else []
    return "\n".join([*lines, *_notes(result["rows"])])


def _notes(rows: list[dict[str, Any]]) -> Iterator[str]:
    peers = [peer for row in rows for peer in row.get("peers", ())]
    for name, note in sorted({(peer["name"], peer["note"]) for peer in peers if "ratio" in peer}):
        yield f"\n{name}: {note}. A ratio above 1 means that ours is faster."
    for name, reason in sorted(
        {(peer["name"], peer["absent"]) for peer in peers if "absent" in peer}
    ):
        yield f"\n{name} is absent: {reason}."


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        if arguments.markdown:
            print(markdown(json.loads(arguments.markdown.read_text())))
            return 0
        return run(arguments)
    except (UsageError, OSError, json.JSONDecodeError) as failure:
        print(f"kernels.py: error: {failure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
