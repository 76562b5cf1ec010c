"""One scheduler of the host in a process of its own: no HTTP, no tokenizer, no other process.

Run as a script it reads jobs, one JSON line each, and runs every job in a fork, so that the host is
imported once. `Schedulers` starts it and hands it jobs.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

_FIRST_PORT = itertools.count(33500, 3)


class Schedulers:
    """A process that has imported the host and forks a scheduler for each job."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"DSV4_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        )

    def run(self, model: Path, prompts: list[list[int]], *arguments: str, **options) -> dict:
        """What `answers` returns, from a scheduler of `model` with the host's `arguments`;
        `options` are those of `answers`, and variables of its environment in capitals."""
        job = {
            "arguments": ["--model-path", str(model), "--port", str(next(_FIRST_PORT)), *arguments],
            "environment": {n: v for n, v in options.items() if n.isupper()},
            "options": {n: v for n, v in options.items() if not n.isupper()},
            "prompts": prompts,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                answer = json.loads(line.removeprefix("ANSWER "))
                assert "error" not in answer, answer["error"]
                return answer
        raise AssertionError(f"the process of the schedulers ended ({self._process.wait(10)})")

    def close(self) -> None:
        self._process.kill()  # an idle one; taking the host down in order takes half a minute
        self._process.wait()


def boot(arguments: list[str]):
    """The host's scheduler, as its own process would build it."""
    from sglang.srt.entrypoints.engine import resolve_auto_parsers
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang.srt.server_args import PortArgs, prepare_server_args

    common = "--device cpu --skip-tokenizer-init --disable-overlap-schedule --log-level error"
    server_args = prepare_server_args([*common.split(), *arguments])
    server_args.resolve_once()
    server_args.check_server_args()
    resolve_auto_parsers(server_args)
    ports = PortArgs.init_new(server_args)
    rank = spawn_world_rank(server_args, tp_rank=0, pp_rank=0)
    ranks = SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=0)
    publish(server_args, role="scheduler", ranks=ranks)
    torch.set_num_threads(1)
    return Scheduler(server_args, ports)


def _submit(scheduler, name: str, ids: list[int], new_tokens: int):
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    sampling.normalize(None)
    scheduler.handle_generate_request(
        TokenizedGenerateReqInput(
            rid=name,
            input_text="",
            input_ids=array.array("q", ids),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )
    )
    return scheduler.waiting_queue[-1]


def _fill_with_nan(scheduler) -> None:
    """Every compressor ring of the pool: whoever reads a row that nobody wrote shows it."""
    pool = scheduler.tp_worker.model_runner.token_to_kv_pool
    for state in (*pool.compress_state_pools, *pool.indexer_compress_state_pools):
        if state is not None:
            state.kv_score_buffer.kv_score.fill_(float("nan"))


def answers(
    arguments: list[str],
    prompts: list[list[int]],
    new_tokens: list[int],
    tape: bool = False,
    retract_every: int = 0,
) -> dict[str, Any]:
    """Greedy continuations of all prompts at once, of `new_tokens` each, with NaN in every ring:
    the tokens, the requests of each decode step, a digest of its logits and the largest of each
    row.
    With `tape`, decode steps are captured; after every so many steps the host takes a request back.
    """
    import hashlib

    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers import scheduler as module
    from sglang.srt.plugins import load_plugins

    module.TEST_RETRACT, module.TEST_RETRACT_INTERVAL = bool(retract_every), retract_every
    load_plugins()
    if tape:
        from tape import install

        install()
    scheduler = boot(arguments)
    _fill_with_nan(scheduler)
    runner = scheduler.tp_worker.model_runner
    digests: list[str] = []
    batches: list[int] = []
    largest: list[float] = []
    forward = runner.forward

    def watched(batch, *args, **kwargs):
        result = forward(batch, *args, **kwargs)
        output = result if isinstance(result, LogitsProcessorOutput) else result.logits_output
        if batch.forward_mode.is_decode():
            assert output.next_token_logits.isfinite().all()
            batches.append(batch.batch_size)
            largest.extend(output.next_token_logits.amax(-1).tolist())
            digests.append(hashlib.sha256(output.next_token_logits.numpy().tobytes()).hexdigest())
        return result

    runner.forward = watched
    requests = [
        _submit(scheduler, f"r{n}", ids, count)
        for n, (ids, count) in enumerate(zip(prompts, new_tokens))
    ]
    with torch.inference_mode():
        while not all(request.finished() for request in requests):
            plan = scheduler.get_next_batch_to_run(
                running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
            )
            scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
            if batch:
                scheduler.process_batch_result(batch, scheduler.run_batch(batch))
            scheduler.last_batch = batch
    return {
        "tokens": [list(request.output_ids) for request in requests],
        "digests": digests,
        "batches": batches,
        "largest": largest,
        **_told(runner, tape),
    }


def _told(runner, tape: bool) -> dict[str, Any]:
    """What this package and the tapes counted."""
    from dsv4_plugin.ops.operator import report_rows

    decode = [row for row in report_rows() if row.phase == "decode"]
    told = {"moe_calls": sum(row.calls for row in decode if row.operator == "moe")}
    if not tape:
        return told
    graphs = runner.decode_cuda_graph_runner
    return told | {
        "replays": graphs.backend.replays,
        "operations": {key.size: len(t.calls) for key, t in graphs.backend.tapes.items()},
        "read_done_in_graph": sorted(set(graphs.read_done)),
    }


def _in_a_fork(job: dict) -> str:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(2, 1)  # what the host prints is no answer
        os.environ.update(job["environment"])
        try:
            answer = answers(job["arguments"], job["prompts"], **job["options"])
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(write, "w") as out:
            out.write(json.dumps(answer))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as out:
        answer = out.read()
    os.waitpid(pid, 0)
    return answer or json.dumps({"error": "the scheduler's process ended without an answer"})


def main() -> None:
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        for module in ("entrypoints.engine", "managers.scheduler", "models.registry"):
            importlib.import_module(f"sglang.srt.{module}")
        from sglang.srt.platforms import current_platform

        current_platform.is_out_of_tree()  # decided once, here
    for line in sys.stdin:
        print("ANSWER", _in_a_fork(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
