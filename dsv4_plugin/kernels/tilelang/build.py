"""The one place where TileLang kernels are compiled and launched.

On a GPU TileLang's JIT compiles a variant, keeps it in its cache and launches it. `compiled` makes
the same code object for an AMD GPU that need not be here: TileLang's lowering, then any clang that
knows the chip, with the headers that Triton's wheel brings and, for what they lack, those of
`headers/`. Numbers of such an object hold for its clang; a ROCm container has another.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tilelang
from tilelang import env, tvm

from ... import device

_HEADERS = Path(__file__).parent / "headers"
_CLANGS = ("clang++-22", "amdclang++")
_WAVE = 64


class CompilerMissing(RuntimeError):
    """There is no clang for AMD code here."""


@dataclass(frozen=True)
class Lowered:
    """One variant for one chip: device source, and what a launch of it needs."""

    name: str
    source: str
    threads: int
    local_bytes: int
    """LDS of a workgroup, all of it given at launch."""
    parameters: tuple[str, ...]
    """Of the device function, in its order."""
    function: Any
    extents: tuple[Any, ...]
    """Of the grid, in terms of arguments and sizes."""

    def bind(self, arguments: tuple) -> dict[str, Any]:
        """Arguments, and sizes that shapes leave open, by name."""
        values: dict[str, Any] = {}
        for parameter, given in zip(self.function.params, arguments, strict=True):
            buffer = self.function.buffer_map.get(parameter)
            if buffer is None:
                values[parameter.name] = given
                continue
            values[buffer.name] = given
            for size, wanted in zip(given.shape, buffer.shape, strict=True):
                if isinstance(wanted, tvm.tirx.Var):
                    values[wanted.name] = size
        return values

    def grid(self, values: Mapping[str, Any]) -> tuple[int, ...]:
        """Workgroups of a launch with these values."""
        return tuple(_evaluate(extent, values) for extent in self.extents)


def _evaluate(expression: Any, values: Mapping[str, Any]) -> int:
    """An integer expression of TIR with numbers for its variables."""
    if isinstance(expression, int):
        return expression
    variables: dict[Any, Any] = {}

    def note(node: Any) -> None:
        if isinstance(node, tvm.tirx.Var):
            variables[node] = tvm.tirx.IntImm(str(node.dtype), int(values[node.name]))

    tvm.tirx.stmt_functor.post_order_visit(expression, note)
    return int(
        tvm.arith.Analyzer().simplify(tvm.tirx.stmt_functor.substitute(expression, variables))
    )


class Kernel:
    """A kernel in all its variants: `make` gives the TileLang function of one from its constants.

    Called with the arguments of that function, and its constants by name. With `checked`, TileLang
    guards every access whose place it cannot prove; without, the kernel's own conditions do.
    """

    def __init__(self, make: Callable[..., Any], checked: bool = True):
        self._make, self.name = make, make.__name__
        self._config = {
            tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: not checked,
            # a prover's minute, and false alarms; the tests execute the code and look for races
            tilelang.PassConfigKey.TL_DISABLE_DATA_RACE_CHECK: True,
        }
        functools.update_wrapper(self, make)

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        self.run(arguments, constants)

    def run(self, arguments: tuple, constants: dict[str, Any]) -> None:
        """Launches the variant on this machine's GPU."""
        self.load(device.arch(), **constants)(*arguments)

    @functools.cache  # noqa: B019 - kernels live as long as the process
    def load(self, arch: str, **constants: Any) -> Callable[..., None]:
        """The variant as TileLang launches it, from its cache or compiled into it."""
        return tilelang.compile(
            self._make(**constants), target=_target(arch), pass_configs=self._config
        )

    @functools.cache  # noqa: B019
    def lower(self, arch: str, **constants: Any) -> Lowered:
        """The variant's device source, HIP or CUDA, for a GPU that need not be here."""
        function, target = self._make(**constants), tvm.target.Target(_target(arch))
        with target, tvm.transform.PassContext(opt_level=3, config=self._config):
            artifact = tilelang.lower(function, target=target)
        ((name, kernel),) = artifact.device_mod.functions_items()
        extents = kernel.attrs["thread_extent"]
        return Lowered(
            name=name.name_hint,
            source=artifact.kernel_source,
            threads=int(extents["threadIdx.x"]),
            local_bytes=int(kernel.attrs.get("dyn_shared_memory_buf", 0)),
            parameters=tuple(parameter.name for parameter in kernel.params),
            function=function,
            extents=tuple(extents.get(f"blockIdx.{axis}", 1) for axis in "xyz"),
        )


def _target(arch: str) -> dict[str, str]:
    """TileLang's target of a chip as `device.arch` names it."""
    if arch.startswith("gfx"):
        return {"kind": "hip", "mcpu": arch}
    return {"kind": "cuda", "arch": f"{arch}a" if arch == "sm_90" else arch}


@functools.cache
def clang() -> tuple[str, str]:
    """(path, version) of the clang that compiles HIP here. Raises CompilerMissing."""
    for name in _CLANGS:
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
            return path, re.search(r"version (\S+)", said.stdout)[1]
    raise CompilerMissing(
        f"none of {', '.join(_CLANGS)} is here to compile HIP; apt-get install clang-22 lld-22"
    )


def _command(arch: str) -> list[str]:
    import triton

    rocm = Path(triton.__file__).parent / "backends" / "amd"
    includes = (_HEADERS, rocm / "include", Path(tilelang.__file__).parent / "src")
    return [
        *(clang()[0], f"--rocm-path={rocm}"),
        *("-x", "hip", "-nogpulib", "-std=c++20", "-O3", "-S", "-w"),
        *(f"--offload-arch={arch}", "--offload-device-only", "-D__HIP_PLATFORM_AMD__=1"),
        *(f"-I{each}" for each in includes),
    ]


@functools.cache
def _environment() -> bytes:
    """What an object depends on beside its source."""
    digest = hashlib.sha256(f"{clang()[1]} {tilelang.__version__}".encode())
    for path in sorted(_HEADERS.rglob("*.h*")):
        digest.update(path.read_bytes())
    return digest.digest()


def compile_without_rocm(arch: str) -> None:
    """Makes TileLang compile HIP for `arch` with the clang that is here, in this process from now
    on. It keeps the result as if its own compiler had made it."""
    from tvm_ffi import register_global_func

    def compile_hip(source: str, target: Any) -> bytes:
        with tempfile.TemporaryDirectory() as name:
            _compile(source, arch, Path(name))
            return (Path(name) / "kernel.hsaco").read_bytes()

    register_global_func("tilelang_callback_hip_compile", compile_hip, override=True)


def compiled(lowered: Lowered, arch: str) -> Any:
    """The code object of an AMD GPU, with no GPU, from the cache on disk or compiled into it; it
    has `asm` and `metadata` as what Triton compiles.

    Raises CompilerMissing, and RuntimeError with what clang said.
    """
    digest = hashlib.sha256(lowered.source.encode() + arch.encode() + _environment())
    folder = Path(env.TILELANG_CACHE_DIR) / "code_objects" / digest.hexdigest()[:32]
    if not (folder / "kernel.hsaco").exists():
        _compile(lowered.source, arch, folder)
    return SimpleNamespace(
        asm={
            "amdgcn": (folder / "kernel.s").read_text(),
            "hsaco": (folder / "kernel.hsaco").read_bytes(),
        },
        metadata=SimpleNamespace(
            name=lowered.name,
            num_warps=-(-lowered.threads // _WAVE),
            num_stages=None,
            shared=lowered.local_bytes,
        ),
    )


def _compile(source: str, arch: str, folder: Path) -> None:
    """Writes kernel.s and, last, kernel.hsaco to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        (place / "kernel.hip").write_text(source)
        _run(*_command(arch), str(place / "kernel.hip"), "-o", str(place / "kernel.s"))
        assembly = (place / "kernel.s").read_text()
        # A device library's function that no header defines stays a call, through which registers
        # and scratch of the result would mean nothing.
        calls = set(re.findall(r"(\w+)@rel32@lo", assembly))
        if calls := calls - set(re.findall(r"^(\w+):", assembly, re.MULTILINE)):
            raise RuntimeError(f"functions that {_HEADERS} does not define: {sorted(calls)}")
        _run(
            *(clang()[0], "-target", "amdgcn-amd-amdhsa", f"-mcpu={arch}", "-nogpulib"),
            *("-x", "assembler", str(place / "kernel.s"), "-o", str(place / "kernel.hsaco")),
        )
        os.replace(place / "kernel.s", folder / "kernel.s")
        os.replace(place / "kernel.hsaco", folder / "kernel.hsaco")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-4000:]}")
