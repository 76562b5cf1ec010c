"""SGLang's `Engine` in somebody's own process: what the workers cannot take is refused there too,
as a ValueError of one sentence, and the engine lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"

SCRIPT = """
import json, sys
import sglang

def main():
    engine = sglang.Engine(
        model_path=sys.argv[1], device="cpu", max_total_tokens=16384, log_level="error"
    )

    def ask(**request):
        try:
            answer = engine.generate(**request)
        except Exception as error:
            return [type(error).__name__, str(error)]
        return ["answer", answer["meta_info"]["completion_tokens"]]

    short = {"max_new_tokens": 3, "ignore_eos": True}
    for request in (
        {"input_ids": [5, 6, 7], "sampling_params": short},
        {"input_ids": [10**6], "sampling_params": short},
        {"input_ids": [-1], "sampling_params": short},
        {"prompt": "", "sampling_params": short},
        {"input_ids": [], "sampling_params": short},
        {"prompt": "x", "sampling_params": {**short, "top_k": 2**40}},
        {"prompt": "x", "sampling_params": {**short, "temperature": -1}},
        {"prompt": "In the", "sampling_params": short},
    ):
        print("SAID", json.dumps(ask(**request)), flush=True)
    for change in (
        lambda: engine.update_weights_from_disk(sys.argv[1] + "/nosuch"),
        engine.release_memory_occupation,
    ):
        try:
            print("SAID", json.dumps(["answer", change()]), flush=True)
        except Exception as error:
            print("SAID", json.dumps([type(error).__name__, str(error)]), flush=True)
    print("SAID", json.dumps(ask(prompt="In the", sampling_params=short)), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each request of the script came to."""
    script = tmp_path_factory.mktemp("engine") / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, script, str(TINY)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"DSV4_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    lines = [line for line in ran.stdout.splitlines() if line.startswith("SAID ")]
    return [json.loads(line.removeprefix("SAID ")) for line in lines]


def test_what_the_workers_cannot_take_is_a_value_error(said):
    assert said[0] == ["answer", 3]
    for kind, sentence in said[1:7]:
        assert kind == "ValueError" and "\n" not in sentence
    for (_, sentence), named in zip(
        said[1:7],
        ("token id 1000000", "token id -1", "empty", "no prompt", "top_k", "temperature"),
    ):
        assert named in sentence


def test_what_changes_a_running_engine_is_refused_or_whole(said):
    assert "nosuch" in said[8][1] and said[8][0] == "RequestRefused"
    assert said[9][0] == "RequestRefused" and "memory" in said[9][1]


def test_the_engine_lives_on(said):
    assert said[7] == ["answer", 3] and said[10] == ["answer", 3]
    assert len(said) == 11
