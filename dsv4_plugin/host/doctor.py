"""What `dsv4 doctor` looks at: the machine, the packages, the switches, SGLang, and whether our
seams hold in it.

SGLang is imported last and only when everything before it allows that, so that the doctor works
where the server does not.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from .. import device, flags
from . import version

OK, WARNING, WRONG = "ok", "warning", "wrong"
KNOWN_ARCHS = ("gfx950", "gfx942", "sm_90")
"""Architectures that the tests compile every kernel for."""
_PLUGINS = "sglang.srt.plugins"


@dataclass(frozen=True)
class Check:
    """One line of the doctor: what was looked at, how it is, what was found, and what to do when it
    is not well."""

    name: str
    status: str
    found: str
    advice: str = ""


def examine() -> Iterator[Check]:
    """All checks, in the order that one depends on another; those that an earlier one rules out are
    left out."""
    yield Check("dsv4_plugin", OK, _own_version())
    yield Check("python", OK, platform.python_version())
    yield from _torch()
    yield from _packages()
    host = _host_version()
    yield host
    yield from _switches()
    yield from _implementations()
    yield from _caches()
    if host.status != OK:
        return
    yield from _patches()
    try:
        off = not flags.enabled("DSV4_PLUGIN")
        flags.check()
    except flags.FlagError:
        return
    if off:
        yield Check(
            "plugin",
            WARNING,
            "DSV4_PLUGIN=0: the server is stock SGLang",
            "unset DSV4_PLUGIN to serve with this package",
        )
        return
    entry = _entry_point()
    yield entry
    if entry.status == OK:
        yield from _seams()


def _own_version() -> str:
    found = device.package_version("dsv4_plugin") or "not installed by pip"
    return f"{found}, in {Path(__file__).parents[1]}"


def _torch() -> Iterator[Check]:
    found = device.package_version("torch")
    if found is None:
        yield Check(
            "torch",
            WRONG,
            "not installed",
            "install the torch of your machine (ROCm or CUDA), or use an SGLang image",
        )
        return
    import torch

    build = (
        f"ROCm {torch.version.hip}"
        if torch.version.hip
        else f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "CPU"
    )
    amd, visible = Path("/dev/kfd").exists(), torch.cuda.is_available()
    if amd and not torch.version.hip:
        yield Check(
            "torch",
            WRONG,
            f"{found} ({build}) on a machine with AMD GPUs",
            "a CUDA or CPU build replaced ROCm's: start again from the ROCm image and install with"
            " pip install --no-deps",
        )
    else:
        yield Check("torch", OK, f"{found} ({build})")
    if visible:
        arch = device.arch()
        properties = torch.cuda.get_device_properties(0)
        status = OK if arch.startswith(KNOWN_ARCHS) else WARNING
        yield Check(
            "device",
            status,
            f"{torch.cuda.device_count()} x {properties.name} ({arch}), "
            f"{properties.total_memory / 2**30:.0f} GiB",
            (
                ""
                if status == OK
                else (
                    f"kernels are tested for {', '.join(KNOWN_ARCHS)}; run dsv4 verify before you"
                    " serve"
                )
            ),
        )
    elif amd:
        yield Check(
            "device",
            WRONG,
            "/dev/kfd is there, but torch sees no GPU",
            "give the process /dev/kfd and /dev/dri, its user the groups video and render, and"
            " check HIP_VISIBLE_DEVICES",
        )
    else:
        yield Check(
            "device",
            OK,
            "no GPU: serves on the CPU (dsv4 serve MODEL --cpu), where every operator runs its"
            " reference",
        )


def _packages() -> Iterator[Check]:
    for name in ("triton", "tilelang", "flydsl", "aiter"):
        found = device.package_version(name)
        needed = (
            name == "triton"
            and device.package_version("torch") is not None
            and device.arch() != device.CPU
        )
        if found is None and needed:
            yield Check(
                name,
                WRONG,
                "not installed",
                "install the triton that belongs to your torch; most kernels need it",
            )
        else:
            yield Check(
                name, OK, found or "not installed; implementations that need it are not offered"
            )


def _host_version() -> Check:
    try:
        return Check("sglang", OK, f"{version.check()} (supported: {version.SUPPORTED})")
    except version.HostVersionError as error:
        problem, _, advice = str(error).partition(". ")
        return Check(
            "sglang", WRONG, problem, advice or "install it with: pip install 'dsv4_plugin[host]'"
        )


def _switches() -> Iterator[Check]:
    if device.package_version("torch") is not None:
        from . import kernels  # noqa: F401  all operators' implementations, the values of flags
    try:
        flags.check()
    except flags.FlagError as error:
        yield Check(
            "switches", WRONG, str(error), "change or unset it; dsv4 flags lists all switches"
        )
        return
    chosen = [
        f"{flag.name}={flags.read(flag.name)}"
        for flag in flags.FLAGS
        if flags.setting(flag.name).source != "default"
    ]
    yield Check("switches", OK, ", ".join(chosen) or "none set, which is the best setting")
    for note in flags.notes():
        yield Check("switches", WARNING, note, "use the switch it is taken for, or unset it")
    if device.package_version("torch") is None:
        return
    from ..ops import operator as selection

    try:
        selection.configure()
        yield Check(
            "operators", OK, f"all {len(selection.OPERATORS)} can run what is asked of them"
        )
    except selection.SelectionError as error:
        yield Check(
            "operators",
            WRONG,
            str(error),
            "choose another implementation, or auto; dsv4 verify shows what runs here",
        )


def _implementations() -> Iterator[Check]:
    """What this GPU lacks, and which operators go on without what needs it."""
    if device.package_version("torch") is None or device.arch() == device.CPU:
        return
    from ..ops.operator import OPERATORS

    without: dict[str, list[str]] = {}
    for each in OPERATORS.values():
        ways = {name: way for name, way in each.implementations.items() if way.measured}
        reasons = {name: way.unavailable() for name, way in ways.items()}
        runs = next((name for name, reason in reasons.items() if reason is None), flags.REFERENCE)
        for name, reason in reasons.items():
            if reason is not None:
                without.setdefault(reason, []).append(f"{each.name} ({runs}, not {name})")
    for reason, operators in without.items():
        slow = any(f"({flags.REFERENCE}," in operator for operator in operators)
        yield Check(
            "implementations",
            WARNING if slow else OK,
            f"{reason}; so auto takes for {', '.join(operators)}",
            "a reference is right, and slow" if slow else "",
        )


def _cache_directories() -> dict[str, Path]:
    base = device.host_caches()
    variables = {
        "triton": ("TRITON_CACHE_DIR", base / "triton"),
        "tilelang": ("TILELANG_CACHE_DIR", base / "tilelang"),
        "aiter": ("AITER_JIT_DIR", Path.home() / ".aiter"),
        "flydsl": ("FLYDSL_RUNTIME_CACHE_DIR", Path.home() / ".flydsl"),
    }
    found = {
        name: Path(os.environ.get(variable) or default)
        for name, (variable, default) in variables.items()
        if device.package_version("amd-aiter" if name == "aiter" else name) is not None
    }
    return {"sglang": base, **found}


def _caches() -> Iterator[Check]:
    directories = _cache_directories()
    for name, path in directories.items():
        nearest = next(parent for parent in (path, *path.parents) if parent.exists())
        if not os.access(nearest, os.W_OK | os.X_OK) or not nearest.is_dir():
            yield Check(
                f"cache of {name}",
                WRONG,
                f"{path} cannot be written",
                "make it writable or set its directory elsewhere: without it every start compiles"
                " again",
            )
        else:
            size = (
                sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                if path.exists()
                else 0
            )
            yield Check(f"cache of {name}", OK, f"{path}, {size / 1e6:.1f} MB")
    if device.package_version("torch") is None or device.arch() == device.CPU:
        yield Check("first start", OK, "nothing is compiled on a CPU")
    elif not any(directories["triton"].rglob("*.hsaco")) and not any(
        directories["triton"].rglob("*.cubin")
    ):
        yield Check(
            "first start",
            WARNING,
            "no kernel is compiled yet, so the first start takes a minute or two longer",
            "run dsv4 build MODEL once, here or on a machine without a GPU, and keep the cache",
        )
    else:
        yield Check("first start", OK, "kernels are compiled already")


def _patches() -> Iterator[Check]:
    from . import patches

    try:
        root = patches.host_root()
        for patch in patches.patches():
            state = patch.state(root)
            drifted = state == patches.DRIFTED
            yield Check(
                f"patch {patch.name}",
                WARNING if drifted else OK,
                f"{state}{'' if state == patches.APPLIED else '; without it ' + patch.without}",
                (
                    f"SGLang's files are not as released: dsv4 patch check {patch.name}"
                    if drifted
                    else ""
                ),
            )
    except patches.PatchError as error:
        yield Check("patches", WRONG, str(error), "reinstall dsv4_plugin")


def _entry_point() -> Check:
    found = {entry.name: entry.value for entry in metadata.entry_points(group=_PLUGINS)}
    ours = [name for name, value in found.items() if value.startswith("dsv4_plugin.")]
    others = sorted(set(found) - set(ours))
    allowed = os.environ.get("SGLANG_PLUGINS")
    if not ours:
        return Check(
            "plugin",
            WRONG,
            "SGLang would not find dsv4_plugin: it is not installed in this Python",
            f"install it into {sys.prefix}: pip install --no-deps dsv4_plugin",
        )
    if allowed is not None and ours[0] not in [name.strip() for name in allowed.split(",")]:
        return Check(
            "plugin",
            WRONG,
            f"SGLANG_PLUGINS={allowed} leaves out {ours[0]}",
            f"add {ours[0]} to it, or unset it",
        )
    return Check(
        "plugin",
        OK,
        f"SGLang loads it as {ours[0]}" + (f", beside {', '.join(others)}" if others else ""),
    )


def _seams() -> Iterator[Check]:
    """Loads the plugins as a server does, in this process, and looks at what SGLang holds
    afterwards."""
    from sglang.srt.plugins import load_plugins

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_plugins()
        from .ledger import taken
        from .seams import BACKEND
    except SystemExit:
        yield Check("seams", WRONG, "the plugin refuses to load, see above", "mend what it says")
        return
    for seam in taken():
        if seam.holds():
            yield Check("seam", OK, seam.target)
        else:
            holders = ", ".join(_origin(found) for found in seam.found()) or "nothing"
            yield Check(
                "seam",
                WRONG,
                f"{seam.target} holds {holders}",
                "another plugin or package took it: leave it out with SGLANG_PLUGINS=dsv4, or"
                " uninstall it",
            )
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES

    known = BACKEND in ATTENTION_BACKEND_CHOICES
    yield Check(
        "choices",
        OK if known else WRONG,
        f"--attention-backend {'takes' if known else 'refuses'} {BACKEND}",
        "" if known else "this SGLang is not as released; reinstall it",
    )


def _origin(value: object) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
