"""The host's model class for DeepSeek-V4: our model, its checkpoint, and the host's logits
processor around them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub
import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_device, get_model
from torch import Tensor, nn

from .. import flags
from ..checkpoint.files import SINGLE, CheckpointFiles
from ..checkpoint.load import Loader
from ..config import Geometry
from ..model import DeepseekV4
from ..ops.operator import configure
from .ledger import take, taken, verify
from .metrics import Recorder
from .parallel import host_parallel
from .probe import probe_if_asked, run_what_is_named
from .sampler import SAMPLER

logger = logging.getLogger(__name__)


class Head:
    """What the host's LogitsProcessor takes for an LM head.

    It hands over only the rows whose logits are wanted, as flattened streams [n, 4·d]; collapse,
    norm and head are ours, so that logits are those of the model and the rows nobody asks for are
    never collapsed. Not a Module: the host would post-process its `quant_method` as a quantised
    layer.
    """

    def __init__(self, model: DeepseekV4):
        self.model = model

    @property
    def weight(self) -> Tensor:
        return self.model.head.weight

    @property
    def quant_method(self) -> Head:
        return self

    def apply(self, layer: object, streams: Tensor, bias: Tensor | None = None) -> Tensor:
        """fp32 logits [n, vocab of this process]."""
        return self.model.logits(
            self.model.collapse(streams.unflatten(-1, (self.model.geometry.hc_mult, -1)))
        )


def model_directory(model_path: str, revision: str | None = None) -> Path:
    """Directory that holds the model's config.json; for a name on the Hugging Face hub, where the
    host put it."""
    if Path(model_path).is_dir():
        return Path(model_path)
    return Path(
        huggingface_hub.hf_hub_download(model_path, "config.json", revision=revision)
    ).parent


class DeepseekV4ForCausalLM(nn.Module):
    """DeepSeek-V4 in the host. Config, file headers and parallel layout are checked before a weight
    is read."""

    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        if SAMPLER not in taken():
            take([SAMPLER])
        verify("while the model is built")
        configure()
        directory = model_directory(get_model().model_path, get_model().revision)
        geometry, precision, parallel = (
            Geometry.from_dir(directory),
            flags.precision(),
            host_parallel(),
        )
        parallel.check(geometry)
        if directory == Path(get_model().model_path):
            files = CheckpointFiles(directory)
            files.check(geometry)
            if files.files == [SINGLE]:
                # The host would read every .safetensors file of the directory; an index narrows
                # that, without one we do.
                self.allow_patterns_overrides = files.files
        if geometry.dspark and parallel.vocab.rank == 0:
            logger.info(
                "dsv4_plugin: the checkpoint's DSpark draft (%d stages, %d tokens a step) is not"
                " loaded: this version serves the model without it",
                geometry.dspark.stages,
                geometry.dspark.block_size,
            )
        self.model = DeepseekV4(
            geometry, precision, parallel, get_device().device, parts="backbone"
        )
        self.head = Head(self.model)
        self.logits_processor = LogitsProcessor(config)
        self.recorder = Recorder()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Feeds the host's weight iterator to our loader. Raises CheckpointError for what does not
        fit."""
        loader = Loader(self.model, self.model.geometry, self.model.parallel)
        for name, tensor in weights:
            loader.put(name, tensor)
        loader.finish()
        run_what_is_named(self.model)
        probe_if_asked(self.model)

    def get_embed_and_head(self) -> tuple[Tensor, Tensor]:
        return self.model.embed.weight, self.model.head.weight

    @torch.no_grad()  # not inference_mode: the host's sampler changes the logits in place
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        """Logits of the rows the batch asks for. `positions` are in the step plan already."""
        backend = get_attn_backend()
        plan, captured = backend.plan(forward_batch), backend.capturing
        with contextlib.nullcontext() if captured is None else captured.calls.counted():
            streams = self.model(input_ids, plan, backend.caches).flatten(1)
            output = self.logits_processor(
                input_ids, streams, self.head, forward_batch, hidden_states_before_norm=streams
            )
        if captured is None:  # a replay is counted where its plan is refreshed
            self.recorder.step(plan.phase)
        return output
