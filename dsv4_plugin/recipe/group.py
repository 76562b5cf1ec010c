"""Arms of a recipe that run together on this machine: a prefill server, a decode server and the
router before them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .command import of_this_python

END_SECONDS = 20.0
"""Time given to a process to end what it started."""


@dataclass(frozen=True)
class Member:
    """One process of the group."""

    name: str
    words: Sequence[str]
    environment: Mapping[str, str]
    leads: bool = False
    """Whether the group ends with it: the router, without which nobody reaches the others."""


def run_together(members: Sequence[Member]) -> int:
    """Starts all members and waits; what they print is printed after their name.

    A member that ends is named and the others go on, so that it can be started again; the group
    ends when one that leads does, when all have, or when a signal ends this process. Returns the
    status of the last that ended.
    """
    previous = signal.signal(signal.SIGTERM, _leave)
    running: dict[str, subprocess.Popen] = {}
    status = 0
    try:
        for member in members:
            running[member.name] = _start(member)
        leading = {member.name for member in members if member.leads}
        while running:
            time.sleep(0.2)
            for name in [name for name, each in running.items() if each.poll() is not None]:
                status = running.pop(name).returncode
                print(f"dsv4 recipe: {name} ended with status {status}", flush=True)
                if name in leading:
                    return status
        return status
    finally:
        _end(list(running.values()))
        signal.signal(signal.SIGTERM, previous)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _start(member: Member) -> subprocess.Popen:
    process = subprocess.Popen(
        of_this_python(member.words),
        env={**os.environ, **member.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    threading.Thread(target=_print, args=(member.name, process), daemon=True).start()
    return process


def _print(name: str, process: subprocess.Popen) -> None:
    for line in process.stdout:
        sys.stdout.write(f"{name}: {line}")
        sys.stdout.flush()


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Ends them and whatever they started: they are asked first."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + END_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
