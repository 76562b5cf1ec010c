"""Check on this machine, with fresh random data, that every implementation agrees with its
reference.

Run it before trusting a new image. Without a GPU the Triton kernels are interpreted, at small
sizes. At the end a tiny checkpoint goes through the whole model. The exit status is 1 when a check
fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


class VerifyError(ValueError):
    """What was asked to be verified is not here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", help="fail at once unless this machine has this architecture, such as gfx950"
    )
    parser.add_argument(
        "--op", action="append", metavar="OPERATOR", help="only this operator; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="Pro shapes only, small steps only")
    parser.add_argument(
        "--seed",
        type=int,
        help="of the random data (default: a new one each time, which is printed)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=0,
        metavar="N",
        help="also split a tiny model over N processes, and check that they choose alike",
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help=(
            "remember which implementations are faster on this GPU: `auto` prefers those from the"
            " next start on"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is imported
    from .. import device, flags
    from ..host import kernels  # noqa: F401  all operators' implementations
    from ..ops import operator as selection
    from ..runtime import verify

    flags.check()
    names = _operators(arguments.op, list(flags.OPERATORS))
    if arguments.arch and device.arch() != arguments.arch:
        raise VerifyError(f"this machine is {device.arch()}, not {arguments.arch}")
    if arguments.ranks not in (0, 2, 4):
        raise VerifyError(f"--ranks {arguments.ranks}: the tiny model splits over 2 or 4 ranks")
    if 0 < torch.cuda.device_count() < arguments.ranks:
        raise VerifyError(f"--ranks {arguments.ranks}: here are {torch.cuda.device_count()} GPUs")
    if arguments.time and device.arch() == device.CPU:
        raise VerifyError(
            "--time: there is no GPU here, and times of interpreted kernels say nothing"
        )
    seed = time.time_ns() % 2**31 if arguments.seed is None else arguments.seed
    where = verify.machine()
    results = []
    if not arguments.json:
        kind = (
            "interpreted on the CPU at small sizes"
            if where.type == "cpu"
            else "on this GPU, one of eight ranks"
        )
        _say(
            f"{device.arch()}, torch {device.package_version('torch')}, triton"
            f" {device.package_version('triton')}; kernels {kind}; --seed {seed}"
        )
        _line("operator", "implementation", "error", "allowed", "ms", "reference", "")
    checks = verify.verify_operators(names, where, arguments.quick, seed)
    for result in checks:
        results.append(result)
        _show(result, arguments.json)
    selection.configure()
    if not arguments.op:
        for result in verify.verify_model(where, seed):
            results.append(result)
            _show(result, arguments.json)
    for result in verify.verify_ranks(arguments.ranks, where, seed) if arguments.ranks else ():
        results.append(result)
        _show(result, arguments.json)
    if arguments.time:
        _remember(results, arguments.json)
    return _conclude(results, names, seed, arguments.json)


def _remember(results: list, quiet: bool) -> None:
    """Keeps the times of this machine beside those that other operators had."""
    from .. import measured
    from ..runtime import verify

    seconds = measured.read()[0] | verify.implementation_seconds(results)
    where = measured.write(seconds)
    if quiet:
        return
    for operator, phases in seconds.items():
        for phase in phases:
            times = seconds[operator][phase]
            said = ", ".join(
                f"{name} {times[name] * 1e3:.3g} ms"
                for name in sorted(times, key=times.__getitem__)
            )
            _say(f"{operator} {phase}: {said}")
    _say(f"{where}: `auto` prefers the first of each from the next start on")


def _operators(wanted: list[str] | None, known: list[str]) -> list[str]:
    from ..spelling import suggestion

    for name in wanted or ():
        if name not in known:
            raise VerifyError(f"there is no operator {name!r}; {suggestion(name, known)}")
    return wanted or known


def _line(*cells: str) -> None:
    widths = (19, 14, 7, 7, 6, 9, 0)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip(), flush=True)


def _show(result, quiet: bool) -> None:
    if quiet:
        return
    if not hasattr(result, "error"):
        _line(result.subject, result.implementation, *"----", "not run")
        _say(f"  {result.reason}")
        return
    times = [
        "-" if each is None else f"{each * 1e3:.3g}"
        for each in (result.seconds, result.reference_seconds)
    ]
    _line(
        result.subject,
        result.implementation,
        f"{result.error:.1e}",
        f"{result.tolerance.limit:.0e}",
        *times,
        "ok" if result.passed else "WRONG",
    )
    _say("  " + (result.case if result.passed else f"{result.case}: {result.note}"))


def _say(text: str) -> None:
    """Prints `text` within 80 columns."""
    import textwrap

    print(textwrap.fill(text, 80, subsequent_indent="    ", break_on_hyphens=False), flush=True)


REFERENCE = "reference"


def _conclude(results: list, names: list[str], seed: int, as_json: bool) -> int:
    checks = [result for result in results if hasattr(result, "error")]
    wrong = [result for result in checks if not result.passed]
    verified = {result.subject for result in checks if result.implementation != REFERENCE}
    alone = [name for name in names if name not in verified]
    if as_json:
        from dataclasses import asdict

        rows = [
            asdict(result)
            | (
                {"passed": result.passed, "error": min(result.error, 1e308)}
                if hasattr(result, "error")
                else {}
            )
            for result in results
        ]
        print(json.dumps({"seed": seed, "results": rows, "reference only": alone}, indent=1))
        return 1 if wrong else 0
    for why in sorted(
        {f"{result.tolerance.limit:.0e}: {result.tolerance.why}" for result in checks}
    ):
        _say(f"allowed {why}")
    if alone:
        _say(f"only their reference runs here: {', '.join(alone)}")
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed")
    for result in wrong:
        print(f"dsv4: error: {_complaint(result)}", file=sys.stderr)
    return 1 if wrong else 0


def _complaint(result) -> str:
    from .. import flags

    off = (
        result.note if result.error == float("inf") and result.note else f"error {result.error:.2e}"
    )
    if result.subject in ("model", "ranks"):
        verb = "is" if result.subject == "model" else "are"
        return f"the {result.subject} {verb} wrong: {result.case}, {off}"
    if result.implementation == REFERENCE:
        return (
            f"the reference of {result.subject} is wrong on this device ({result.case}): {off};"
            " torch computes something else here than on the CPU: do not serve with this build"
        )
    return (
        f"{result.subject} is wrong in {result.implementation} ({result.case}): {off}; until that"
        f" is mended set {flags.operator_flag(result.subject)}=reference"
    )
