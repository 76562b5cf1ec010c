"""What becomes of every option of the host with this model: served, refused in one sentence, or
something that a user should never meet.

    PYTHONPATH=. python tests/host/walk_options.py FILE [option ...]

Values are tried one at a time: options of the scheduler with a scheduler in a process of its own
and two prompts, those of the processes around it with a whole server, a prompt, a stream and a
chat. FILE gets a line of JSON a try and is continued where it ends. All of them take about an hour
and a half of two cores. `test_wrong_input.py` holds what was found.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import requests
from live_server import serving
from one_scheduler import Schedulers

from dsv4_plugin.host import arguments, launch

SECONDS = 90
PROMPTS = [list(range(1, 300)), list(range(7, 24))]
NEW_TOKENS = [3, 5]
CHAT = [{"role": "user", "content": "In the"}]
SMALL = ["--max-total-tokens", "10240"]  # the host would size the pool by free memory

MODEL = Path(__file__).parents[1] / "data" / "golden"
CHAT_MODEL = Path(__file__).parents[2] / "checkpoints" / "tiny"

AROUND: dict[str, tuple[str, ...]] = {
    "--tokenizer-path": ("nosuch",),
    "--tokenizer-mode": ("slow",),
    "--tokenizer-backend": ("fastokens",),
    "--tokenizer-worker-num": ("2",),
    "--detokenizer-worker-num": ("-1", "0", "2"),
    "--warmups": ("nosuch",),
    "--api-key": ("",),
    "--served-model-name": ("", "a:b"),
    "--chat-template": ("nosuch", "/dev/null"),
    "--completion-template": ("nosuch",),
    "--hf-chat-template-name": ("nosuch",),
    "--tool-server": ("nosuch",),
    "--file-storage-path": ("/proc/nosuch",),
    "--default-chat-template-kwargs": ("{}", "[1]", "7"),
    "--preferred-sampling-params": ("{}", "[1]", '{"temperature": -1}', '{"nosuch": 1}'),
    "--reasoning-parser": ("nosuch", "none", "deepseek-r1", "qwen3"),
    "--tool-call-parser": ("nosuch", "none", "qwen25"),
    "--stream-interval": ("-1", "0", "3"),
    "--batch-notify-size": ("-1", "0"),
    "--watchdog-timeout": ("-1", "0"),
    "--soft-watchdog-timeout": ("-1", "0"),
    "--numa-node": ("-1", "99"),
    "--gc-threshold": ("-1",),
    "--log-level-http": ("nosuch",),
    "--log-requests-target": ("nosuch", "/proc/nosuch/x"),
    "--crash-dump-folder": ("/proc/nosuch",),
    "--smg-http-sidecar-port": ("-1",),
    "--load-snapshot-publish-interval": ("0",),
    "--bucket-time-to-first-token": ("-1",),
    "--fastapi-root-path": ("nosuch",),
    "--export-metrics-to-file-dir": ("/proc/nosuch",),
    "--constrained-json-whitespace-pattern": ("[",),
    "--grammar-backend": ("outlines", "llguidance", "none"),
    "--dynamic-batch-tokenizer-batch-size": ("-1",),
    "--nccl-port": ("1", "99999"),
    "--dist-timeout": ("1",),
    "--model-checksum": ("",),
    "--config": ("nosuch",),
}
"""Options that processes around the scheduler read, and values to try."""
SWITCHES_AROUND = (
    "--skip-server-warmup",
    "--enable-metrics",
    "--enable-mfu-metrics",
    "--enable-request-time-stats-logging",
    "--enable-trace",
    "--show-time-cost",
    "--log-requests",
    "--enable-strict-thinking",
    "--strip-thinking-cache",
    "--incremental-streaming-output",
    "--enable-streaming-session",
    "--enable-session-radix-cache",
    "--enable-dynamic-batch-tokenizer",
    "--enable-tokenizer-batch-encode",
    "--disable-tokenizer-batch-decode",
    "--enable-custom-logit-processor",
    "--enable-return-hidden-states",
    "--enable-response-store",
    "--enable-http-worker-reuseport",
    "--enable-prefill-delayer",
    "--enable-mixed-chunk",
    "--enable-priority-scheduling",
    "--disable-radix-cache",
    "--disable-overlap-schedule",
    "--allow-auto-truncate",
    "--enable-forward-pass-metrics",
    "--enable-deterministic-inference",
    "--delete-ckpt-after-loading",
    "--checkpoint-engine-wait-weights-before-ready",
    "--model-checksum",
)

ELSEWHERE = {
    "--help",
    "--model-path",
    "--port",
    "--host",
    "--device",
    "--skip-tokenizer-init",
    "--reasoning-parser",
    "--tool-call-parser",
}
"""What the walk itself sets, and what the scheduler does not see."""


def values(action: argparse.Action) -> Iterator[list[str]]:
    """Words to try for an option, without its name: each choice, numbers at the border of sense,
    and a text that means nothing."""
    if action.nargs == 0:
        yield []
    elif action.choices:
        yield from ([str(choice)] for choice in action.choices if choice != action.default)
    elif action.type is float or "float" in str(action.type):
        yield from (["-1"], ["0"], ["7"])
    elif action.type is str or action.type is None:
        yield ["nosuch"]
    elif "int" in getattr(action.type, "__name__", ""):
        yield from (["-1"], ["0"])
    else:
        yield from (["{}"], ["nosuch"])


def tries() -> Iterator[list[str]]:
    for action in dict.fromkeys(arguments.parser()._actions):
        if not (ELSEWHERE | AROUND.keys()) & set(action.option_strings):
            for name in action.option_strings[: 2 if action.nargs == 0 else 1]:
                yield from ([name, *words] for words in values(action))


def outcome(schedulers: Schedulers, model: Path, words: list[str], plain: list) -> dict:
    """The kind of what happened, and the sentence."""
    try:
        launch.check_words(str(model), words)
    except launch.LaunchError as error:
        return {"kind": "refused", "said": str(error)}
    given = SMALL if words[0] not in SMALL else []
    answer = schedulers.ask(model, PROMPTS, *given, *words, new_tokens=NEW_TOKENS, seconds=SECONDS)
    if "error" not in answer:
        return {"kind": "served" if answer["tokens"] == plain else "other tokens", "said": ""}
    ours = [line for line in answer["printed"].splitlines() if line.startswith("dsv4: error: ")]
    if answer["kind"] == "SystemExit" and ours:
        return {"kind": "refused", "said": ours[-1]}
    last = answer["error"].strip().splitlines()[-1]
    if answer["kind"] == "LaunchError":
        return {"kind": "refused by the host", "said": last.partition(": ")[2]}
    return {"kind": "fails", "said": last, "error": answer["error"], "printed": answer["printed"]}


def outcome_around(words: list[str], log: Path) -> dict:
    """The same with `dsv4 serve` and requests over HTTP."""
    try:
        model = log.with_name("model")  # a copy, which an option may have deleted
        shutil.copytree(CHAT_MODEL, model, dirs_exist_ok=True)
        with serving(model, log, *words, tokenizer=True) as server:
            headers = {"Authorization": "Bearer "}
            for path, body in (
                ("/generate", {"text": "In the", "sampling_params": {"max_new_tokens": 8}}),
                ("/v1/completions", {"prompt": "In the", "max_tokens": 8, "stream": True}),
                ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 8}),
            ):
                body = {"model": "default", **body}
                reply = requests.post(server.url + path, json=body, headers=headers, timeout=60)
                if reply.status_code != 200:
                    return {"kind": "answers", "said": f"{path} {reply.status_code} {reply.text}"}
            return {"kind": "served", "said": ""}
    except (AssertionError, requests.RequestException) as error:
        printed = log.read_text()
        ours = [line for line in printed.splitlines() if line.startswith("dsv4: error: ")]
        if ours and "Traceback" not in printed:
            return {"kind": "refused", "said": ours[-1]}
        return {"kind": "fails", "said": str(error)[:100], "printed": printed[-4000:]}


def outcomes(known: list[list[str]], only: tuple[str, ...]) -> Iterator[tuple[list[str], dict]]:
    def wanted(words: list[str]) -> bool:
        return words not in known and (not only or words[0] in only)

    around = [[name, value] for name, values in AROUND.items() for value in values]
    around += [[name] for name in SWITCHES_AROUND]
    with tempfile.TemporaryDirectory() as folder:
        for words in filter(wanted, around):
            yield words, outcome_around(words, Path(folder) / "log")
    schedulers = Schedulers()
    plain = schedulers.run(MODEL, PROMPTS, *SMALL, new_tokens=NEW_TOKENS)["tokens"]
    for words in filter(wanted, tries()):
        yield words, outcome(schedulers, MODEL, words, plain)
    schedulers.close()


def main(file: str, *only: str) -> None:
    warnings.simplefilter("ignore")
    path = Path(file)
    done = path.read_text().splitlines() if path.exists() else []
    with path.open("a") as out:
        started = time.monotonic()
        for words, found in outcomes([json.loads(line)["words"] for line in done], only):
            seconds = round(time.monotonic() - started, 1)
            out.write(json.dumps({"words": words, "seconds": seconds, **found}) + "\n")
            out.flush()
            started = time.monotonic()


if __name__ == "__main__":
    main(*sys.argv[1:])
