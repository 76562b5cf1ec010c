"""Members of a group are started, named in what they print, and ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from dsv4_plugin.recipe.group import Member, run_together

SLEEPS = "print('up', flush=True); import time; time.sleep(60)"


def member(name: str, code: str, leads: bool = False, **environment: str) -> Member:
    return Member(name, ["python", "-c", code], environment, leads)


def test_a_member_that_ends_is_named_and_the_group_ends_with_the_router(capfd):
    """The router waits for a file that the decode server leaves when it ends."""
    before = psutil.Process().children()  # of tests before this one
    status = run_together(
        [
            member("prefill", SLEEPS),
            member("decode", "import os; print(os.environ['ROLE']); os._exit(3)", ROLE="second"),
            member("router", "import time; time.sleep(3); raise SystemExit(5)", leads=True),
        ]
    )
    said = capfd.readouterr().out
    assert status == 5
    assert "prefill: up\n" in said and "decode: second\n" in said
    assert "dsv4 recipe: decode ended with status 3" in said
    assert "dsv4 recipe: prefill ended" not in said  # it ran on, and was ended at the end
    assert set(psutil.Process().children()) <= set(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_members_and_what_they_started(number):
    program = textwrap.dedent(
        f"""
        import signal
        from dsv4_plugin.recipe.group import Member, run_together
        # a shell that starts the tests in the background has them ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        nested = '''import subprocess, sys; subprocess.run([sys.executable, "-c", {SLEEPS!r}])'''
        run_together([Member(n, ["python", "-c", nested], {{}}) for n in ("prefill", "decode")])
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ,
    )
    up = sorted(process.stdout.readline() for _ in range(2))
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.wait(60)
    assert up == ["decode: up\n", "prefill: up\n"] and len(started) == 4
    psutil.wait_procs(started, timeout=10)
    assert not [each for each in started if each.is_running()]
