"""Serve a DeepSeek-V4 checkpoint with SGLang: MODEL first, then any of sglang's own arguments.

The checkpoint, the host and the port are checked before anything is started. `python -m
sglang.launch_server --model-path MODEL ...` serves the same model with the same checks; this
command also sets what `--cpu` needs.
"""

from __future__ import annotations

import argparse
import os

TAKES_OTHER_ARGUMENTS = True
CPU_POOL_TOKENS = 16384
"""Default pool on a CPU. The host would size it by free memory, and zeroing that takes half a
minute; a tenth of it holds the sliding windows, and below 1024 slots there the host admits
nothing."""

CPU_SPIN_COUNT = 1000
"""Rounds that a thread spins for the others before it sleeps. libgomp's 300,000 outlast a time
slice, so that one busy process beside the server makes it ten times slower
(docs/performance.md)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory of the checkpoint, or its name on the Hugging Face hub",
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="serve on the CPU; no GPU and no sgl_kernel build is needed",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve on (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=30000, help="port to serve on (default: %(default)s)"
    )
    parser.add_argument(
        "--tp",
        "--tp-size",
        "--tensor-parallel-size",
        dest="tp",
        type=int,
        default=1,
        help="processes to split the model over (default: %(default)s)",
    )
    parser.add_argument(
        "--ep",
        "--ep-size",
        "--expert-parallel-size",
        dest="ep",
        type=int,
        default=1,
        help="of these, groups that hold different experts (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    from .. import flags
    from ..host import launch, version

    flags.check()
    if not flags.enabled("DSV4_PLUGIN"):
        raise launch.LaunchError(
            "DSV4_PLUGIN=0 turns off what this command serves with; unset it, "
            "or start the stock server with python -m sglang.launch_server"
        )
    version.check()
    if launch.is_hub_name(arguments.model):
        print(
            f"dsv4 serve: {arguments.model} is no directory here; SGLang looks for it on the"
            " Hugging Face hub"
        )
    else:
        launch.check_checkpoint(arguments.model, arguments.tp, arguments.ep)
    launch.check_port(arguments.host, arguments.port)
    environment, added = choices(arguments)
    for name, value in environment.items():
        print(f"dsv4 serve: {name}={value}")
        os.environ[name] = value
    if added:
        print(f"dsv4 serve: {' '.join(added)}", flush=True)
    launch.start_server(
        [
            "--model-path",
            arguments.model,
            "--host",
            arguments.host,
            "--port",
            str(arguments.port),
            "--tp-size",
            str(arguments.tp),
            "--ep-size",
            str(arguments.ep),
            *added,
            *arguments.other,
        ]
    )
    return 0


def choices(arguments: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """What this command sets where the user did not: environment variables, and arguments of the
    host."""
    environment = {} if "DSV4_STRICT" in os.environ else {"DSV4_STRICT": "1"}
    if not arguments.cpu:
        return environment, []
    environment["DSV4_DEVICE"] = "cpu"
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environment["GOMP_SPINCOUNT"] = str(CPU_SPIN_COUNT)
    if arguments.tp > 1 and "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ:
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = _cores_by_rank(arguments.tp)
    added = ["--device", "cpu", "--sleep-on-idle"]
    if not any(word.split("=")[0] == "--max-total-tokens" for word in arguments.other):
        added += ["--max-total-tokens", str(CPU_POOL_TOKENS)]
    return environment, added


def _cores_by_rank(ranks: int) -> str:
    """The cores this process may use, shared out evenly: "0,1|2,3" for two ranks on four cores."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [
        cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]
        for rank in range(ranks)
    ]
    return "|".join(
        ",".join(map(str, share or [cores[rank % len(cores)]])) for rank, share in enumerate(shares)
    )
