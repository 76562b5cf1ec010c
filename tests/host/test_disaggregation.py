"""Prefill and decode as servers of their own, before a real router: the answers of one server, and
what is left when a side is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from live_server import READY_SECONDS, Server, free_port, serving, stop

from dsv4_plugin.host import transfer
from dsv4_plugin.host.launch import LaunchError, check_words

ROOT = Path(__file__).parents[2]
TINY = ROOT / "checkpoints" / "tiny"
NEW_TOKENS = 24


def test_a_missing_transfer_engine_is_one_sentence(golden_dir, monkeypatch):
    monkeypatch.setitem(transfer.ENGINES, "mooncake_tcp", "dsv4_plugin.no_such_engine")
    words = ["--disaggregation-mode", "prefill", "--disaggregation-transfer-backend"]
    check_words(str(golden_dir), [*words, "mori"])  # the host's to judge
    with pytest.raises(LaunchError, match=r"no_such_engine.*dsv4_plugin\[disaggregation\]"):
        check_words(str(golden_dir), [*words, "mooncake_tcp"])


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("precision", ["exact", "official"])
def test_caches_beside_the_pool_are_not_transferred(precision, mode, golden_dir, monkeypatch):
    monkeypatch.setenv("DSV4_PRECISION", precision)
    with pytest.raises(LaunchError, match=f"--disaggregation-mode {mode} cannot be served.*exact"):
        check_words(str(golden_dir), ["--disaggregation-mode", mode])


def recipe_on_free_ports(directory: Path) -> tuple[Path, dict[str, str]]:
    """The shipped recipe with other ports, and the address of each arm."""
    text = (ROOT / "recipes" / "cpu-disaggregated.yaml").read_text()
    for port in range(30001, 30011):
        text = text.replace(str(port), str(free_port()))
    path = directory / "recipe.yaml"
    path.write_text(text)
    arms = yaml.safe_load(text)["arms"]
    return path, {n: f"http://127.0.0.1:{arm['arguments']['port']}" for n, arm in arms.items()}


def load(server: Server) -> tuple[int, int, int]:
    """Requests that run, requests that wait, tokens of the pool in use."""
    [found] = server.request("/v1/loads")["loads"]
    return tuple(found[n] for n in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens"))


def assert_nothing_is_left(server: Server) -> None:
    end = time.monotonic() + 60
    while load(server)[:2] != (0, 0) and time.monotonic() < end:
        time.sleep(0.5)
    server.flush()
    assert load(server) == (0, 0, 0)


def kill_scheduler(url: str) -> psutil.Process:
    """Of the server at `url`; returns its main process."""
    port = url.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "serve" in words and port in words:
            for child in process.children(recursive=True):
                if "scheduler" in " ".join(child.cmdline()):
                    child.kill()
                    return process
    raise AssertionError(f"no server listens on {port}")


def failures(server: Server, prompts: list[list[int]], lost: str) -> list[Exception | dict]:
    """What becomes of long requests whose server `lost` is killed while they run."""

    def one(ids: list[int]) -> Exception | dict:
        try:
            return server.request(
                "/generate",
                {
                    "input_ids": ids,
                    "sampling_params": {
                        "temperature": 0,
                        "max_new_tokens": 400,
                        "ignore_eos": True,
                    },
                },
            )
        except (urllib.error.HTTPError, OSError) as error:
            return error

    with ThreadPoolExecutor(len(prompts)) as pool:
        asked = [pool.submit(one, ids) for ids in prompts]
        time.sleep(5)
        process = kill_scheduler(lost)
        found = [each.result() for each in asked]
    process.wait(60)
    return found


@pytest.mark.thorough
@pytest.mark.timeout(1800)
def test_a_recipe_serves_as_one_server_does_and_survives_the_loss_of_a_side(tmp_path):
    pytest.importorskip("mooncake.engine", exc_type=ImportError)
    pytest.importorskip("sglang_router", exc_type=ImportError)
    draw = random.Random(5)
    prompts = [[draw.randrange(4, 512) for _ in range(n)] for n in (7, 130, 300, 517)]
    prompts.append(prompts[-1])  # two pages of it are cached on the prefill side
    with serving(TINY, tmp_path / "one", tokenizer=True) as server:
        expected = [server.generate(ids, NEW_TOKENS)["output_ids"] for ids in prompts]
    path, urls = recipe_on_free_ports(tmp_path)
    log = tmp_path / "group"
    with log.open("w") as out:
        group = subprocess.Popen(
            [sys.executable, "-m", "dsv4_plugin", "recipe", "run", str(path)]
            + ["--model-path", str(TINY)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    servers = {name: Server(url, log, group) for name, url in urls.items()}
    try:
        await_answer(servers["router"])
        found = [servers["router"].generate(ids, NEW_TOKENS)["output_ids"] for ids in prompts]
        assert found == expected
        for side in ("prefill", "decode"):
            assert_nothing_is_left(servers[side])
        lost = failures(servers["router"], prompts, urls["decode"])
        assert all(isinstance(each, urllib.error.HTTPError) for each in lost)
        assert_nothing_is_left(servers["prefill"])
    finally:
        group.send_signal(signal.SIGTERM)
        group.wait(60)
        stop(group)


def await_answer(router: Server) -> None:
    end = time.monotonic() + 2 * READY_SECONDS
    while time.monotonic() < end and router.process.poll() is None:
        try:
            router.generate([5, 6, 7])
            return
        except OSError:
            time.sleep(2)
    raise AssertionError(f"the router did not answer:\n{router.log.read_text()[-4000:]}")
