"""Telling a kernel that does not compile from one that runs and fails."""

from __future__ import annotations

_COMPILERS = ("triton.", "tilelang.", "flydsl.", "aiter.")
_BUILDING = (
    "triton.compiler.code_generator",
    "triton.backends.nvidia.compiler",
    "triton.backends.amd.compiler",
    "tilelang.engine",
    "tilelang.contrib",
)
"""Modules of compilers that run while a kernel is built, and not while it is loaded or
launched."""


def compile_failure(error: BaseException) -> str | None:
    """What the compiler said, in one line, when `error` says that a kernel cannot be built, or does
    not fit the chip; None for any other error.

    That is an error of a compiler's own class for it, or any that was raised while a kernel was
    built.
    """
    kind = type(error)
    named = kind.__module__.startswith(_COMPILERS) and (
        "Compil" in kind.__name__ or kind.__name__ in ("OutOfResources", "PTXASError")
    )
    return _line(error) if named or _raised_in(error, _BUILDING) else None


def _raised_in(error: BaseException, modules: tuple[str, ...]) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith(modules):
            return True
        trace = trace.tb_next
    return False


def _line(error: BaseException) -> str:
    """The last words of the innermost error: Triton puts the source and a caret before them."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(getattr(error, "error_message", None) or error)
    said = [line.strip() for line in text.splitlines() if any(map(str.isalpha, line))]
    return said[-1][:200] if said else type(error).__name__
