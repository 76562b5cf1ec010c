"""Serve a DeepSeek-V4 checkpoint with SGLang: MODEL first, then any of sglang's own arguments.

The checkpoint, the host and the port are checked before anything is started. `python -m
sglang.launch_server --model-path MODEL ...` serves the same model with the same checks; this
command also sets what `--cpu` needs.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

TAKES_OTHER_ARGUMENTS = True
CPU_POOL_TOKENS = 16384
"""Default pool on a CPU. The host would size it by free memory, and zeroing that takes half a
minute; a tenth of it holds the sliding windows, and below 1024 slots there the host admits
nothing."""

PARSERS = {"--reasoning-parser": "deepseek-v4", "--tool-call-parser": "deepseekv4"}
"""SGLang's parsers of this model's thoughts and tool calls; without them both are plain text of the
answer."""
NO_PARSER = "none"

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
    parser.add_argument(
        "--dp",
        type=int,
        help="with --enable-dp-attention: replicas of the attention among these processes, each"
        " with requests of its own (--attn-dp-size is the same; default: 1)",
    )


def run(arguments: argparse.Namespace) -> int:
    from .. import flags
    from ..host import kernels, launch, version  # noqa: F401  all operators' implementations
    from ..ops import operator

    flags.check()
    if not flags.enabled("DSV4_PLUGIN"):
        raise launch.LaunchError(
            "DSV4_PLUGIN=0 turns off what this command serves with; unset it, "
            "or start the stock server with python -m sglang.launch_server"
        )
    version.check()
    if arguments.dp is not None:
        arguments.other = ["--dp-size", str(arguments.dp), *arguments.other]
    launch.check_port(arguments.host, arguments.port)
    launch.check_words(arguments.model, arguments.other)
    if not arguments.cpu:
        launch.check_device(arguments.other)
    if launch.is_hub_name(arguments.model):
        launch.check_hub_name(arguments.model)
        print(f"dsv4 serve: {arguments.model} is a name on the Hugging Face hub")
    else:
        launch.check_checkpoint(
            arguments.model, arguments.tp, arguments.ep, replicas(arguments), stages(arguments)
        )
        for line in memory_lines(arguments):
            print(f"dsv4 serve: {line}")
        line = kernel_line(arguments)
        if line:
            print(f"dsv4 serve: {line}", flush=True)
    environment, added = choices(arguments)
    for name, value in environment.items():
        print(f"dsv4 serve: {name}={value}")
        os.environ[name] = value
    operator.configure()
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
            *_without_parsers(arguments.other),
        ]
    )
    return 0


def choices(arguments: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """What this command sets where the user did not: environment variables, and arguments of the
    host."""
    from ..host.options import CPU_HOST_MEMORY

    environment = {} if "DSV4_STRICT" in os.environ else {"DSV4_STRICT": "1"}
    given = {word.split("=")[0] for word in arguments.other}
    added = _parsers(arguments.other)
    if not arguments.cpu:
        return environment, added
    environment["DSV4_DEVICE"] = "cpu"
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environment["GOMP_SPINCOUNT"] = str(CPU_SPIN_COUNT)
    processes = arguments.tp * stages(arguments)
    if processes > 1 and "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ:
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = _cores_by_rank(processes)
    added += ["--device", "cpu"]
    if "--enable-prefill-delayer" not in given:  # it counts passes, which take a second asleep
        added += ["--sleep-on-idle"]
    if "--max-total-tokens" not in given:
        added += ["--max-total-tokens", str(CPU_POOL_TOKENS)]
    if "--enable-hierarchical-cache" in given:
        added += [word for pair in CPU_HOST_MEMORY.items() if pair[0] not in given for word in pair]
    return environment, added


def replicas(arguments: argparse.Namespace) -> int:
    """Of the attention, as the words of the command line say."""
    from ..host import options

    return options.given(arguments.other).attn_dp_size or 1


def stages(arguments: argparse.Namespace) -> int:
    """Of the pipeline, as the words of the command line say."""
    from ..host import options

    return options.given(arguments.other).pp_size or 1


def drafts(arguments: argparse.Namespace) -> bool:
    """Whether the words of the command line ask for a draft."""
    from ..host import options

    return options.given(arguments.other).speculative_algorithm is not None


def memory_lines(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The plan of memory in three lines.

    Raises MemoryPlanError when the model does not fit beside one page of cache.
    """
    from .. import device, flags
    from ..cache.layout import PAGE_TOKENS
    from ..config import Geometry, Precision
    from ..roofline import memory_plan as plans
    from ..roofline.layout import Layout

    if stages(arguments) > 1:
        return ("the memory of a pipeline's stages is not planned",)
    geometry, host = Geometry.from_dir(arguments.model), _host_options(arguments.other)
    on_cpu = arguments.cpu or device.arch() == device.CPU
    decoded = on_cpu or flags.precision() is not Precision.SERVING
    layout = Layout(arguments.tp, replicas(arguments), arguments.ep)
    context = min(
        host.context_length or geometry.max_position_embeddings, geometry.max_position_embeddings
    )
    plan = plans.memory_plan(
        geometry,
        layout,
        # The processes of a CPU server share the machine's memory.
        device.memory() / (arguments.tp if on_cpu else 1),
        context=context,
        requests=-(-(host.max_running_requests or plans.RUNNING_REQUESTS) // layout.dp),
        chunk=(host.chunked_prefill_size or plans.CHUNK) // layout.dp,
        fraction=host.mem_fraction_static or plans.MEMORY_FRACTION,
        draft=drafts(arguments),
        dense=4 if decoded else None,
        most_tokens=host.max_total_tokens or (CPU_POOL_TOKENS if arguments.cpu else None),
    )
    lacking = plan.lacking()
    if lacking:
        fitting = plans.layouts_that_fit(plan, geometry, PAGE_TOKENS)
        raise plans.MemoryPlanError(
            f"{arguments.model} does not fit: {lacking}. "
            + (f"{fitting[0]} fits" if fitting and not on_cpu else "See dsv4 plan --help")
        )
    return plans.main_lines(plan, context, "this machine" if on_cpu else "this GPU")


def kernel_line(arguments: argparse.Namespace) -> str | None:
    """Compiles what Triton's cache lacks of this server's kernels, and says so; None where there is
    nothing to compile. A kernel that does not compile is no reason not to start: `auto` takes
    another implementation then."""
    from .. import device, flags
    from ..config import Geometry, Precision
    from ..roofline import memory_plan as plans
    from ..runtime import kernel_cache, kernel_wheel, languages, precompile

    arch = device.arch()
    if (
        arguments.cpu
        or arch not in precompile.TARGETS
        or device.package_version("triton") is None
        or not flags.enabled("DSV4_BUILD")
        or flags.precision() is not Precision.SERVING
    ):
        return None
    if replicas(arguments) > 1:
        return "kernels of data-parallel attention are not built ahead; they compile when needed"
    geometry, host = Geometry.from_dir(arguments.model), _host_options(arguments.other)
    load = precompile.Load(
        host.chunked_prefill_size or plans.CHUNK,
        host.max_running_requests or plans.RUNNING_REQUESTS,
        host.context_length or geometry.max_position_embeddings,
        drafts(arguments) and geometry.dspark is not None,
    )
    manifest = kernel_cache.Manifest(
        Path(arguments.model).resolve().name, arch, arguments.tp, arguments.ep, vars(load)
    )
    jobs = len(os.sched_getaffinity(0))
    begin = partial(
        print, "dsv4 serve: kernels: building those that the cache lacks of", flush=True
    )
    refused = ""
    archive = kernel_wheel.installed(manifest)
    if archive is not None and not (kernel_cache.root() / manifest.name).exists():
        try:
            kernel_cache.unpack(archive, kernel_cache.root())
        except (kernel_cache.BuildError, OSError) as error:
            refused = f"; those of an installed wheel are not taken: {error}"
    try:
        built = kernel_cache.build(manifest, geometry, load, kernel_cache.root(), jobs, begin)
    except (kernel_cache.BuildError, OSError) as error:
        return f"kernels are not built ahead, and compile when they are first needed: {error}"
    places = languages.places(kernel_cache.root())
    os.environ.update(places)
    return (
        f"kernels: {len(built.manifest.kernels)} in the cache, {built.compiled} of them compiled"
        f" now, in {built.seconds:.1f} s{refused}"
        + "".join(f"; {name}={at}" for name, at in places.items())
    )


def _host_options(words: list[str]) -> argparse.Namespace:
    """Those of the host's arguments that decide how memory is used; None where not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("context-length", "max-running-requests", "chunked-prefill-size"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--max-total-tokens", type=int)
    parser.add_argument("--mem-fraction-static", type=float)
    try:
        return parser.parse_known_args(words)[0]
    except argparse.ArgumentError:  # the host says what is wrong with it
        return parser.parse_known_args([])[0]


def _parsers(words: list[str]) -> list[str]:
    """The parsers that `words` do not choose. SGLang reads both from one native parser, so that
    beside another of either kind there is none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in PARSERS:
        parser.add_argument(name, dest=name)
    try:
        given = vars(parser.parse_known_args(words)[0])
    except argparse.ArgumentError:  # the host says what is wrong with it
        return []
    foreign = any(value not in (None, NO_PARSER, PARSERS[name]) for name, value in given.items())
    return [
        word
        for name, value in PARSERS.items()
        if given[name] is None and not foreign
        for word in (name, value)
    ]


def _without_parsers(words: list[str]) -> list[str]:
    """`words` without the parsers that the user chose to be "none", which SGLang cannot be told."""
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] in PARSERS and word == NO_PARSER:
            kept.pop()
        elif word not in {f"{name}={NO_PARSER}" for name in PARSERS}:
            kept.append(word)
    return kept


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
