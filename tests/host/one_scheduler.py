"""Schedulers of the host, each in a process of its own: no HTTP, no tokenizer, one process a rank.

Run as a script it reads jobs, one JSON line each, and runs every job in a fork, so that the host is
imported once. `Schedulers` starts it and hands it jobs.
"""

from __future__ import annotations

import array
import contextlib
import faulthandler
import importlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PORTS = itertools.count(20000 + os.getpid() % 1000 * 12, 3)
"""A job takes two of them, and those that the host derives from the first, 233 to 240 above. All
lie below the ports of outgoing connections (32768 and above, unless the machine says otherwise):
who asks such a port again and again until somebody listens may get it as his own."""
SECONDS = 600
"""Within which a job must be done, before the time of its test is over; the slowest took 20."""


class Schedulers:
    """A process that has imported the host and forks a scheduler for each job; `environment` is
    what must be set before that import."""

    def __init__(self, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"DSV4_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | environment,
        )

    def run(self, model: Path, prompts: list[list[int]], *arguments: str, **options) -> dict:
        """What `answers` returns, from a scheduler of `model` with the host's `arguments`;
        `options` are those of `answers`, and variables of its environment in capitals."""
        answer = self.ask(model, prompts, *arguments, **options)
        assert "error" not in answer, answer["error"] + answer["printed"]
        return answer

    def ask(
        self,
        model: Path,
        prompts: list[list[int]],
        *arguments: str,
        seconds: int = SECONDS,
        **options,
    ) -> dict:
        """The same, or where there is no answer the `error`, its `kind` and the end of what was
        `printed`."""
        return self._ask(model, [prompts], arguments, seconds, options)[0]

    def run_ranks(
        self, model: Path, prompts: list[list[list[int]]], *arguments: str, **options
    ) -> list[dict]:
        """The answers of all ranks of one server, each with prompts of its own: those of one
        replica of the attention must be the same."""
        answers = self._ask(model, prompts, arguments, SECONDS, options)
        failed = [each["error"] + each["printed"] for each in answers if "error" in each]
        assert not failed, "\n".join(failed)
        return answers

    def _ask(self, model, prompts, arguments, seconds: int, options: dict) -> list[dict]:
        port = next(_PORTS)
        job = {
            "meeting_port": port + 1,
            "arguments": ["--model-path", str(model), "--port", str(port), *arguments],
            "environment": {n: v for n, v in options.items() if n.isupper()},
            "options": {n: v for n, v in options.items() if not n.isupper()},
            "prompts": prompts,
            "seconds": seconds,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError(f"the process of the schedulers ended ({self._process.wait(10)})")

    def close(self) -> None:
        self._process.kill()  # an idle one; taking the host down in order takes half a minute
        self._process.wait()


def boot(arguments: list[str], rank: int = 0, meeting_port: int | None = None):
    """The host's scheduler of a `rank`, stage by stage, as its own process would build it; several
    ranks meet at a port."""
    from sglang.srt.entrypoints.engine import resolve_auto_parsers
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank
    from sglang.srt.server_args import PortArgs

    from dsv4_plugin.host.launch import server_args_of

    common = "--device cpu --skip-tokenizer-init --log-level error".split()
    if "--enable-prefill-delayer" not in arguments:  # which the host has with overlap alone
        common.append("--disable-overlap-schedule")
    server_args = server_args_of([*common, *arguments])
    resolve_auto_parsers(server_args)
    ports = PortArgs.init_new(server_args)
    ports.nccl_port = meeting_port or ports.nccl_port
    stage, rank = divmod(rank, server_args.tp_size)
    world_rank = spawn_world_rank(server_args, tp_rank=rank, pp_rank=stage)
    ranks = SpawnRanks(world_rank=world_rank, dp_rank=None, gpu_id=0)
    publish(server_args, role="scheduler", ranks=ranks)
    torch.set_num_threads(1)
    return Scheduler(server_args, ports)


def _request(name: str, ids: list[int], new_tokens: int):
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    sampling.normalize(None)
    return TokenizedGenerateReqInput(
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


def _submit(scheduler, name: str, ids: list[int], new_tokens: int):
    scheduler.handle_generate_request(_request(name, ids, new_tokens))
    return scheduler.waiting_queue[-1]


def _rows_of_another_replica() -> None:
    """Each replica takes the results of the row after its own."""
    from dsv4_plugin.model.replicas import RowsOfAll

    right = RowsOfAll.scatter
    RowsOfAll.scatter = lambda self, shares, own: right(self, shares.roll(1, 0), own)


def _experts_that_nobody_sums() -> None:
    """Each process keeps to what its own experts add."""
    from dsv4_plugin.model.replicas import RowsOfAll

    RowsOfAll.scatter = lambda self, shares, own: shares[self._here] + own


def _experts_of_the_first_process() -> None:
    """What the routed experts of other processes add is lost."""
    from dsv4_plugin.model.feed_forward import FeedForward

    right, first = FeedForward._routed, torch.distributed.get_rank() == 0
    FeedForward._routed = lambda self, *rest: right(self, *rest) * float(first)


FAULTS = {
    "experts of the first process": _experts_of_the_first_process,
    "rows of another replica": _rows_of_another_replica,
    "experts that nobody sums": _experts_that_nobody_sums,
}


def _fill_with_nan(scheduler) -> None:
    """Every compressor ring of the pool: whoever reads a row that nobody wrote shows it."""
    pool = scheduler.tp_worker.model_runner.token_to_kv_pool
    for state in (*pool.compress_state_pools, *pool.indexer_compress_state_pools):
        if state is not None:
            state.kv_score_buffer.kv_score.fill_(float("nan"))


def _watch_draft(scheduler) -> list[torch.Tensor]:
    """Takes the logits of every row that the MTP block reads, step after step."""
    draft, kept = scheduler.draft_worker.draft_worker.draft_runner.model, []
    process = draft.logits_processor.forward

    def watched(input_ids, streams, *rest):
        kept.append(draft.head.apply(None, streams))
        return process(input_ids, streams, *rest)

    draft.logits_processor.forward = watched
    return kept


def answers(
    arguments: list[str],
    prompts: list[list[int]],
    new_tokens: list[int],
    tape: bool = False,
    retract_every: int = 0,
    logits: str = "",
    draft_logits: str = "",
    one_by_one: bool = False,
    fault: str = "",
    rank: int = 0,
    meeting_port: int | None = None,
    deliver: Callable[[dict], None] | None = None,
) -> dict[str, Any]:
    """Greedy continuations of all prompts at once, or `one_by_one`, of `new_tokens` each, with NaN
    in every ring: the tokens, the cached tokens of each prompt and how many of them lay in the
    host's memory, the requests of each decode step, a digest of its logits and the largest of each
    row.
    With `tape`, decode steps are captured; after every so many steps the host takes a request back;
    in the directory `logits` those of every new token are written, [prompts][tokens, vocab], in
    `draft_logits` those of every row that the MTP block reads, [steps][rows, vocab]. With a
    `fault` of FAULTS the model makes that mistake. A stage of a pipeline hands its answer to
    `deliver` and goes on, because the others may not be done.
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
    scheduler = boot(arguments, rank, meeting_port)
    if fault:
        FAULTS[fault]()
    _fill_with_nan(scheduler)
    runner = scheduler.tp_worker.model_runner
    digests: list[str] = []
    batches: list[int] = []
    largest: list[float] = []
    verified: list[tuple[int, int]] = []
    forward = runner.forward

    def watched(batch, *args, **kwargs):
        result = forward(batch, *args, **kwargs)
        output = result if isinstance(result, LogitsProcessorOutput) else result.logits_output
        if batch.forward_mode.is_target_verify():
            verified.append((batch.batch_size, batch.positions.shape[0]))
        if batch.forward_mode.is_decode() and runner.pp_group.is_last_rank:
            assert output.next_token_logits.isfinite().all()
            batches.append(batch.batch_size)
            largest.extend(output.next_token_logits.amax(-1).tolist())
            digests.append(hashlib.sha256(output.next_token_logits.numpy().tobytes()).hexdigest())
        return result

    runner.forward = watched
    delays = _delays(scheduler)
    requests, rows = [], {}
    drafted = _watch_draft(scheduler) if draft_logits else []

    def told() -> dict[str, Any]:
        if logits and rows:
            kept = [
                torch.stack([rows[request.rid, n] for n in range(len(request.output_ids))])
                for request in requests
            ]
            torch.save(kept, Path(logits) / f"rank{rank}.pt")
        if draft_logits:
            torch.save(drafted, Path(draft_logits) / f"rank{rank}.pt")
        return {
            "cached": [request.cached_tokens for request in requests],
            "retracted": sum(request.retraction_count for request in requests),
            "tokens": [list(request.output_ids) for request in requests],
            "cached_in_host": [request.cached_tokens_host for request in requests],
            "digests": digests,
            "batches": batches,
            "largest": largest,
            "verified": verified,
            "delays": delays,
            **_told(runner, tape),
        }

    if deliver is not None:
        _run_a_stage(
            scheduler, prompts, new_tokens, one_by_one, requests, rows, lambda: deliver(told())
        )
    waiting = list(enumerate(zip(prompts, new_tokens)))
    with torch.inference_mode():
        while True:
            if waiting and not (one_by_one and any(not each.finished() for each in requests)):
                due, waiting = (waiting[:1], waiting[1:]) if one_by_one else (waiting, [])
                requests += [_submit(scheduler, f"r{n}", *prompt) for n, prompt in due]
            if _all_ranks(not waiting and all(request.finished() for request in requests)):
                break
            plan = scheduler.get_next_batch_to_run(
                running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
            )
            scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
            if batch:
                result = scheduler.run_batch(batch)
                for request, row in zip(batch.reqs, result.logits_output.next_token_logits):
                    rows[request.rid, len(request.output_ids)] = row.clone()
                scheduler.process_batch_result(batch, result)
            scheduler.last_batch = batch
    return told()


def _run_a_stage(
    scheduler, prompts, new_tokens, one_by_one: bool, requests: list, rows: dict, done: Callable
) -> None:
    """The host's own loop of one stage of a pipeline, which never ends; the first stage takes the
    prompts where it would receive them. Fills `requests` and `rows`, and calls `done` when all
    requests are."""
    from sglang.srt.managers import schedule_batch

    made, ingest, run_batch = (
        schedule_batch.Req.__init__,
        scheduler.ingest_requests,
        scheduler.run_batch,
    )
    waiting = [_request(f"r{n}", *each) for n, each in enumerate(zip(prompts, new_tokens))]
    told = False

    def keep(request, *args, **kwargs):
        made(request, *args, **kwargs)
        requests.append(request)

    def receive(*args, **kwargs):
        nonlocal told
        over = all(request.finished() for request in requests)
        if not told and over and len(requests) == len(prompts):
            told = True
            done()
        if not scheduler.pp_group.is_first_rank:
            return ingest(*args, **kwargs)
        if one_by_one and not over:
            return []
        count = 1 if one_by_one else len(waiting)
        due = [waiting.pop(0) for _ in range(min(count, len(waiting)))]
        scheduler.process_input_requests(due)
        return due

    def run(batch, *args, **kwargs):
        result = run_batch(batch, *args, **kwargs)
        if result.logits_output is not None:
            for request, row in zip(batch.reqs, result.logits_output.next_token_logits):
                rows[request.rid, len(request.output_ids)] = row.clone()
        return result

    schedule_batch.Req.__init__ = keep
    scheduler.ingest_requests, scheduler.run_batch = receive, run
    scheduler.run_event_loop()


def _delays(scheduler) -> list[int]:
    """Filled, pass by pass, with how many replicas could prefill where the host's delayer let none
    of them."""
    delays: list[int] = []
    if scheduler.prefill_delayer is not None:
        negotiate = scheduler.prefill_delayer._negotiate_should_allow_prefill

        def watched(*args, **kwargs):
            outcome = negotiate(*args, **kwargs)
            if not outcome.output_allow:
                delays.append(outcome.num_prefillable)
            return outcome

        scheduler.prefill_delayer._negotiate_should_allow_prefill = watched
    return delays


def _all_ranks(done: bool) -> bool:
    """Whether every rank is `done`: those of other replicas take part in each step."""
    from sglang.srt.runtime_context import get_parallel

    everybody = torch.tensor(int(done))
    group = get_parallel().tp_group
    if group.world_size > 1:
        torch.distributed.all_reduce(everybody, torch.distributed.ReduceOp.MIN, group.cpu_group)
    return bool(everybody)


def _told(runner, tape: bool) -> dict[str, Any]:
    """What this package and the tapes counted."""
    from dsv4_plugin.ops.operator import report_rows

    rows = report_rows()
    decode = [row for row in rows if row.phase == "decode"]
    told = {
        "moe_calls": sum(row.calls for row in decode if row.operator == "moe"),
        "ran": sorted({(row.operator, row.implementation) for row in rows if row.calls}),
    }
    if not tape:
        return told
    graphs = runner.decode_cuda_graph_runner
    return told | {
        "replays": graphs.backend.replays,
        "operations": {key.size: len(t.calls) for key, t in graphs.backend.tapes.items()},
        "read_done_in_graph": sorted(set(graphs.read_done)),
    }


class _Fork:
    """A process of one rank, its answer and what it prints."""

    def __init__(self, job: dict, rank: int):
        self.answer, write = os.pipe()
        self.text = b""
        self.printed = tempfile.TemporaryFile()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for stream in (1, 2):
                os.dup2(self.printed.fileno(), stream)
            os.environ.update(job["environment"])
            # of a thread of its own: one that waits in a collective runs no handler of a signal
            faulthandler.dump_traceback_later(job["seconds"], exit=True, file=self.printed)
            faulthandler.register(signal.SIGUSR1, file=self.printed)

            def deliver(answer: dict) -> None:
                with os.fdopen(write, "w") as out:
                    out.write(json.dumps(answer))

            try:
                options = dict(job["options"], rank=rank, meeting_port=job["meeting_port"])
                if "--pp-size" in job["arguments"]:
                    options["deliver"] = deliver
                if options.get("new_tokens") and isinstance(options["new_tokens"][0], list):
                    options["new_tokens"] = options["new_tokens"][rank]
                answer = answers(job["arguments"], job["prompts"][rank], **options)
            except BaseException as error:
                answer = {"error": traceback.format_exc(), "kind": type(error).__name__}
            with contextlib.suppress(OSError):  # delivered already
                deliver(answer)
            os._exit(0)
        os.close(write)

    def read(self) -> bool:
        """Takes what there is of the answer; whether that was the end of it."""
        part = os.read(self.answer, 1 << 20)
        self.text += part
        return not part

    def kill(self) -> None:
        for kill in (os.killpg, os.kill):  # a new process may have no group yet
            with contextlib.suppress(ProcessLookupError):
                kill(self.pid, signal.SIGKILL)

    def end(self) -> dict:
        """The answer of a process that is over."""
        os.close(self.answer)
        if self.text:  # a stage of a pipeline goes on until it is ended
            self.kill()
        answer = json.loads(self.text or '{"error": "the process of the scheduler ended"}')
        _, status = os.waitpid(self.pid, 0)
        answer.setdefault(
            "kind", f"signal {os.WTERMSIG(status)}" if status and not self.text else ""
        )
        self.printed.seek(0)
        with self.printed:
            return answer | {"printed": self.printed.read().decode(errors="replace")[-4000:]}


def _in_forks(job: dict) -> list[dict]:
    """The answers of all ranks; when one fails, the others are ended: they would wait for it."""
    count = len(job["prompts"])
    if count > 1:
        cores = sorted(os.sched_getaffinity(0))
        bound = "|".join(str(cores[rank % len(cores)]) for rank in range(count))
        job["environment"]["SGLANG_CPU_OMP_THREADS_BIND"] = bound
    forks = [_Fork(job, rank) for rank in range(count)]
    running = {fork.answer: fork for fork in forks}
    while running:
        for ready in select.select(list(running), [], [])[0]:
            fork = running[ready]
            if not fork.read():
                continue
            del running[ready]
            if fork.text.startswith(b'{"error"') or not fork.text:
                for other in running.values():
                    os.kill(other.pid, signal.SIGUSR1)  # it prints where it is
                time.sleep(1)
                for other in running.values():
                    other.kill()
    return [fork.end() for fork in forks]


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
        print("ANSWER", json.dumps(_in_forks(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
