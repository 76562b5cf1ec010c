"""A CPU in the place of a GPU that captures graphs.

A `Tape` records the torch operations of one step on the tensors they ran on, raises on everything a
capturing stream forbids, and replays them on the same memory: Python values, addresses and shapes
stay what they were at the capture, as in a CUDA or HIP graph. `install` lets the host's own graph
runner drive it through the hooks that it offers to platforms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense is_nonzero equal nonzero masked_select bincount _unique2 unique_dim"
        " unique_consecutive repeat_interleave.Tensor lift_fresh"
    ).split()
)
"""Operations whose result, or its shape, the host must wait for; the last is torch.tensor(...), a
copy from memory that a graph does not own."""
_READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__)
"""Reads by the host that are no operation on a CPU."""


class Forbidden(RuntimeError):
    """An operation that a capturing stream would refuse."""


def _waits(func: torch._ops.OpOverload, args: tuple) -> bool:
    name = func._schema.name
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        return any(at is not None and at.dtype in (torch.bool, torch.uint8) for at in args[1])
    overload = func._schema.overload_name
    return name in WAITS or f"{name}.{overload}" in WAITS


class _NoReads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _READS:
            raise Forbidden(f"{func.__name__} on a capturing stream")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """While it is entered it records; `replay` runs what it recorded."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] = []
        self._no_reads = _NoReads()

    def __enter__(self):
        self._no_reads.__enter__()
        return super().__enter__()

    def __exit__(self, *failure):
        super().__exit__(*failure)
        self._no_reads.__exit__(*failure)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(func, args):
            raise Forbidden(f"{func} on a capturing stream")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        """Runs the operations again; each result goes into the memory that it had before."""
        for func, args, kwargs, before in self.calls:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(before)):
                if hasattr(new, "wait"):  # a collective's handle
                    new.wait()
                if not isinstance(new, torch.Tensor) or new.data_ptr() == old.data_ptr():
                    continue
                if new.shape != old.shape:
                    raise Forbidden(f"{func} gave {tuple(old.shape)}, now {tuple(new.shape)}")
                old.copy_(new)


def graph_backend() -> type:
    """The host's graph backend, with tapes for graphs."""
    from sglang.srt.model_executor.runner_backend import base_cuda_graph_backend
    from sglang.srt.runtime_context import get_parallel

    class TapeBackend(base_cuda_graph_backend.BaseCudaGraphBackend):
        def __init__(self, runner, **_):
            self.tapes: dict[Any, Tape] = {}
            self.outputs: dict[Any, Any] = {}
            self.replays = 0
            self.group = get_parallel().tp_group

        @contextlib.contextmanager
        def capture_session(self, stream) -> Iterator[None]:
            yield

        def capture_one(self, shape_key, forward_fn, capture_inputs=None, post_warmup_hook=None):
            for _ in range(2):
                self.group.barrier()
                forward_fn()
                if post_warmup_hook is not None:
                    post_warmup_hook()
            with Tape() as tape:
                self.outputs[shape_key] = forward_fn()
            self.tapes[shape_key] = tape

        def can_run(self, forward_batch, shape_key) -> bool:
            return shape_key in self.tapes

        @contextlib.contextmanager
        def replay_session(self) -> Iterator[None]:
            yield

        def replay(self, shape_key, static_forward_batch, **_):
            self.replays += 1
            self.tapes[shape_key].replay()
            return self.outputs[shape_key]

        def cleanup(self) -> None:
            self.tapes.clear()
            self.outputs.clear()

    return TapeBackend


def graph_runner() -> type:
    """The host's decode graph runner without its streams and events."""
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    class TapeRunner(DecodeCudaGraphRunner):
        read_done: list[bool] = []
        """For each published end of reads, whether it lies within the graph."""

        def _capture(self) -> None:
            self.warmup()
            self.buffers.seq_lens.fill_(self.seq_len_fill_value)
            self.buffers.seq_lens_cpu.fill_(self.seq_len_fill_value)
            self.buffers.reset_index_buffers()
            with self.backend.capture_session(None), torch.no_grad():
                self._capture_one_stream()

        def _record_in_graph_metadata_prep_done(self) -> None:
            pass

        def _publish_read_done(self, in_graph: bool) -> None:
            self.read_done.append(in_graph)

    return TapeRunner


def install() -> None:
    """Lets the CPU platform of this process capture its decode steps on tapes. Before the host
    resolves its arguments."""
    from sglang.srt.model_executor import forward_batch_info
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.interface import PlatformCapabilities

    platform = type(current_platform)
    platform.capabilities = PlatformCapabilities(graph_capture=True)
    platform.get_full_graph_backend_cls = lambda self: graph_backend()
    forward_batch_info.ForwardMode.is_cpu_graph = forward_batch_info.ForwardMode.is_cuda_graph
    runner = graph_runner()

    def capture(*, model_runner):
        return cuda_graph_setup.GraphCapture(
            runner=runner(model_runner), memory_phase="decode", memory_usage_gb=0, capture_time=0
        )

    cuda_graph_setup.capture_decode_graph = capture
