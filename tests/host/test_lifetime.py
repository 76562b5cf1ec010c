"""Whatever a server started ends with it, at every moment of its life."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from live_server import DSV4, READY_SECONDS, free_port


def alive(group: int) -> list[psutil.Process]:
    """Processes of a process group that still run."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.2)
    return False


@pytest.mark.parametrize(
    ("number", "reached", "seconds"),
    [
        # The detokenizer and the second rank are still importing then.
        pytest.param(signal.SIGTERM, "Load weight begin", 60, id="TERM while weights load"),
        # What still imports leaves when it has.
        pytest.param(
            *(signal.SIGKILL, "server_args=", READY_SECONDS),
            marks=pytest.mark.thorough,
            id="KILL while workers import",
        ),
    ],
)
def test_no_process_is_left(golden_dir, tmp_path, number, reached, seconds):
    log = tmp_path / "log"
    command = [str(DSV4), "serve", str(golden_dir), "--cpu", "--skip-tokenizer-init"]
    command += ["--tp", "2", "--port", str(free_port())]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        assert wait_for(lambda: reached in log.read_text(), READY_SECONDS), log.read_text()[-2000:]
        if number == signal.SIGKILL:  # the workers, and not only the helper of multiprocessing
            assert wait_for(lambda: len(alive(process.pid)) >= 3, READY_SECONDS)
        os.kill(process.pid, number)  # the main process alone
        process.wait(60)
        assert wait_for(lambda: not alive(process.pid), seconds), alive(process.pid)
    finally:
        for left in alive(process.pid):
            left.kill()


_WORKERS = """
import multiprocessing, os, signal, time

from dsv4_plugin.host.lost_worker import lost
from sglang.srt.utils.watchdog import SubprocessWatchdog

def worker(seconds, code):
    time.sleep(seconds)
    os._exit(code)

context = multiprocessing.get_context("fork")
processes = [context.Process(target=worker, args=each) for each in ((60, 0), (60, 0), (0, 3))]
for process in processes:
    process.start()
os.kill(processes[1].pid, signal.SIGKILL)
processes[1].join()
processes[2].join()
print(*lost(SubprocessWatchdog(processes, ["scheduler_0", "scheduler_1", "detokenizer"])))
processes[0].kill()
"""


def test_a_worker_that_a_signal_ended_is_named():
    result = subprocess.run(
        [sys.executable, "-c", _WORKERS],
        capture_output=True,
        text=True,
        timeout=READY_SECONDS,
        env=os.environ | {"DSV4_DEVICE": "cpu"},
    )
    said = result.stdout.strip().splitlines()[-1]
    assert said.startswith("scheduler_1 (pid=") and "was ended by SIGKILL" in said, result.stderr
    assert said.count("pid=") == 1  # one still runs, one ended by itself and said why


_ORPHAN = """
import ctypes, multiprocessing, os, sys, time

def child(ready):
    ctypes.CDLL(None).prctl(1, 9)  # as SGLang's workers ask, too late: the parent has gone
    from dsv4_plugin.host.lifetime import end_if_orphaned
    end_if_orphaned()
    open(ready, "w").close()

def late(ready):
    time.sleep(1)
    child(ready)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=late, args=(sys.argv[1],))
    process.start()
    time.sleep(float(sys.argv[2]))
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("parent_lives", "goes_on"), [(0.5, False), (8.0, True)])
def test_a_worker_that_asked_too_late_ends_itself(tmp_path, parent_lives, goes_on):
    program, mark = tmp_path / "program.py", tmp_path / "mark"
    program.write_text(_ORPHAN)
    subprocess.run([sys.executable, str(program), str(mark), str(parent_lives)], timeout=60)
    time.sleep(3)
    assert Path(mark).exists() == goes_on


_SCHEDULER = """
import multiprocessing, os, sys, time

def scheduler(mark):
    import sglang.srt.managers.scheduler as scheduler  # longer than the parent lives
    open(mark, "w").write("imported")
    while multiprocessing.parent_process().is_alive():
        time.sleep(0.1)
    scheduler.load_plugins()
    open(mark, "w").write("loaded")
    scheduler.kill_itself_when_parent_died()
    open(mark, "w").write("goes on")

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=scheduler, args=(sys.argv[1],)).start()
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.1)
    os.kill(os.getpid(), 9)
"""


def test_a_scheduler_asks_after_it_loaded_plugins_and_still_ends(tmp_path):
    """The order of the host's `run_scheduler_process`; the ranks whose parent died before they read
    what to do end themselves, and this one would wait for them for ever."""
    program, mark = tmp_path / "program.py", tmp_path / "mark"
    program.write_text(_SCHEDULER)
    process = subprocess.Popen(
        [sys.executable, str(program), str(mark)],
        start_new_session=True,
        env=os.environ | {"DSV4_DEVICE": "cpu"},
    )
    process.wait(READY_SECONDS)
    try:
        assert wait_for(lambda: not alive(process.pid), READY_SECONDS), mark.read_text()
        assert mark.read_text() == "loaded"
    finally:
        for left in alive(process.pid):
            left.kill()
