"""The host's model class for DeepSeek-V4: our model, its checkpoint, and the host's logits
processor around them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import huggingface_hub
import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_device, get_model, get_spec
from torch import Tensor, nn

from .. import flags
from ..checkpoint.files import INDEX, SINGLE, CheckpointFiles
from ..checkpoint.load import Loader
from ..checkpoint.schema import expected_tensors
from ..config import Geometry, Precision
from ..model import DeepseekV4
from ..ops.operator import configure
from .ledger import take, taken, verify
from .metrics import Recorder
from .parallel import host_parallel
from .probe import probe_if_asked, run_what_is_named
from .sampler import SAMPLER
from .timeline import TIMELINE, told

logger = logging.getLogger(__name__)

_STREAMS = "hidden_states"
"""The host's name for what one stage of a pipeline sends to the next."""


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
    def org_vocab_size(self) -> int:
        return self.model.geometry.vocab_size

    @property
    def quant_method(self) -> Head:
        return self

    def apply(self, layer: object, streams: Tensor, bias: Tensor | None = None) -> Tensor:
        """fp32 logits [n, vocab of this process], or [n, vocab] where attention is data parallel:
        the host's gather would take rows of streams from other replicas."""
        hidden = self.model.collapse(streams.unflatten(-1, (self.model.geometry.hc_mult, -1)))
        if self.model.parallel.replicas is None:
            return self.model.logits(hidden)
        return self.model.whole_logits(hidden)


def model_directory(model_path: str, revision: str | None = None) -> Path:
    """Directory that holds the model's config.json; for a name on the Hugging Face hub, where the
    host put it."""
    if Path(model_path).is_dir():
        return Path(model_path)
    return Path(
        huggingface_hub.hf_hub_download(model_path, "config.json", revision=revision)
    ).parent


def files_to_read(directory: Path) -> list[str] | None:
    """Names of weight files for the host, which would read every .safetensors file of `directory`;
    None where an index narrows that."""
    single = (directory / SINGLE).is_file() and not (directory / INDEX).is_file()
    return [SINGLE] if single else None


class DeepseekV4ForCausalLM(nn.Module):
    """DeepSeek-V4 in the host. Config, file headers and parallel layout are checked before a weight
    is read."""

    def __init__(self, config, quant_config=None, prefix: str = ""):
        super().__init__()
        TIMELINE.end("set-up of SGLang")
        if SAMPLER not in taken():
            take([SAMPLER])
        verify("while the model is built")
        configure()
        directory = model_directory(get_model().model_path, get_model().revision)
        geometry, precision = Geometry.from_dir(directory), flags.precision()
        parallel = host_parallel(geometry.num_hidden_layers)
        parallel.check(geometry)
        if directory == Path(get_model().model_path):
            CheckpointFiles(directory).check(geometry)
        self.allow_patterns_overrides = files_to_read(directory)
        drafts = get_spec().speculative_algorithm is not None
        if geometry.dspark and not drafts and parallel.vocab.rank == 0:
            logger.info(
                "dsv4_plugin: the checkpoint's DSpark draft (%d stages, %d tokens a step) is not"
                " loaded; --speculative-algorithm DSPARK serves with it",
                geometry.dspark.stages,
                geometry.dspark.block_size,
            )
        self.model = DeepseekV4(
            geometry, precision, parallel, get_device().device, parts="backbone"
        )
        self.cached_layers = parallel.stage(geometry)
        for model in (self, self.model):  # the host asks both
            model.start_layer, model.end_layer = self.cached_layers.start, self.cached_layers.stop
        self.head = self.lm_head = Head(self.model)
        self.taps = False
        self.logits_processor = LogitsProcessor(
            config, skip_all_gather=parallel.replicas is not None
        )
        self.recorder = Recorder()
        TIMELINE.end("checks and model")

    @property
    def geometry(self) -> Geometry:
        return self.model.geometry

    @property
    def precision(self) -> Precision:
        return self.model.precision

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Feeds the host's weight iterator to our loader. Raises CheckpointError for what does not
        fit."""
        geometry = self.model.geometry
        loader = Loader(self.model, geometry, self.model.parallel)
        total = sum(spec.nbytes for spec in expected_tensors(geometry).values())
        for name, tensor in told(weights, total):
            loader.put(name, tensor)
        loader.finish()
        TIMELINE.end("weights")
        if len(self.cached_layers) == geometry.num_hidden_layers:  # these take whole steps
            run_what_is_named(self.model)
            TIMELINE.end("named implementations")
            probe_if_asked(self.model)
            TIMELINE.end("probe")

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """What makes [T, d] of token ids int64 [T], for a draft."""
        return self.model.embedded

    def set_dspark_layers_to_capture(self, layer_ids: list[int]) -> None:
        """From now on a forward gives the taps of the DSpark draft with its logits. Raises
        ValueError for other layers than those of config.json."""
        expected = list(self.geometry.dspark.target_layer_ids)
        if list(layer_ids) != expected:
            raise ValueError(f"the draft reads layers {expected}, and the host wants {layer_ids}")
        self.taps = True

    def get_embed_and_head(self) -> tuple[Tensor, Tensor]:
        return self.model.embed.weight, self.model.head.weight

    @torch.no_grad()  # not inference_mode: the host's sampler changes the logits in place
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> LogitsProcessorOutput | PPProxyTensors:
        """Logits of the rows the batch asks for, or from any but the last stage of a pipeline its
        streams. `positions` are in the step plan already."""
        backend = get_attn_backend()
        plan, captured = backend.plan(forward_batch), backend.capturing
        taps: list[Tensor] | None = [] if self.taps else None
        with contextlib.nullcontext() if captured is None else captured.calls.counted():
            tokens = input_ids[: plan.position.shape[0]]  # the rest pads a step of all replicas
            before = None
            if self.cached_layers.start:
                before = pp_proxy_tensors[_STREAMS].unflatten(-1, (self.model.geometry.hc_mult, -1))
            streams = self.model(tokens, plan, backend.caches, taps, before).flatten(1)
            # What the host keeps of hidden states: the taps for a draft, or else the streams.
            kept = (None, streams) if taps is None else (taps, None)
            if self.model.parallel.is_last(self.model.geometry):
                output = self.logits_processor(input_ids, streams, self.head, forward_batch, *kept)
            else:
                output = PPProxyTensors({_STREAMS: streams})
        if captured is None:  # a replay is counted where its plan is refreshed
            reads = forward_batch.forward_mode.is_extend_without_speculative()
            self.recorder.step("prefill" if reads else "decode")
        return output
