"""New weights for a running server, from a directory on disk: all of them or none.

SGLang loads them over the old ones and, when that fails, reads the same files again. Here config
and headers are checked on every rank before the first weight is touched, and weights that cannot be
read to the end are followed by those that were served before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.runtime_context import get_parallel

from ..checkpoint.files import CheckpointError, CheckpointFiles
from ..config import ConfigError, Geometry
from .dspark import DeepseekV4ForCausalLMDSpark
from .model import DeepseekV4ForCausalLM, model_directory
from .mtp import DeepseekV4ForCausalLMNextN

_OURS = DeepseekV4ForCausalLM, DeepseekV4ForCausalLMDSpark, DeepseekV4ForCausalLMNextN

host_update = WeightUpdater.update_weights_from_disk


def check_weights(directory: str, served: Geometry) -> CheckpointFiles:
    """The files in `directory`, whose headers hold a model of geometry `served`.

    Raises ConfigError or CheckpointError otherwise.
    """
    files = CheckpointFiles(directory)
    found = Geometry.from_dir(directory)
    other = [
        f"{field.name} is {getattr(found, field.name)}, not {getattr(served, field.name)}"
        for field in dataclasses.fields(Geometry)
        if getattr(found, field.name) != getattr(served, field.name)
    ]
    if other:
        raise CheckpointError(
            f"{directory} holds another model than the one that is served: {'; '.join(other[:3])}"
        )
    files.check(found)
    return files


def update_weights_from_disk(
    updater: WeightUpdater,
    model_path: str,
    load_format: str,
    weight_name_filter: Callable[[str], bool] | None = None,
    recapture_cuda_graph: bool = False,
) -> tuple[bool, str]:
    """(whether the weights in directory `model_path` are now served, a sentence about it).

    The weights are copied into the tensors that are there, so captured graphs stay valid.
    """
    model = updater.get_model()
    if not isinstance(model, _OURS):
        return host_update(
            updater, model_path, load_format, weight_name_filter, recapture_cuda_graph
        )
    if weight_name_filter is not None:
        return False, "only all weights of a checkpoint are loaded together"
    if any(getattr(module, "is_prepared", False) for module in model.modules()):
        return False, (
            "weights were prepared for an implementation that was asked for by name (dsv4 flags),"
            " and cannot be exchanged while it serves; start the server anew"
        )
    before = model_directory(updater.model_config.model_path, updater.model_config.revision)
    error = _on_every_rank(lambda: check_weights(model_path, model.geometry))
    if error:
        return False, error
    error = _on_every_rank(lambda: model.load_weights(CheckpointFiles(model_path).tensors()))
    if error:
        model.load_weights(CheckpointFiles(before).tensors())
        return False, f"{error}; the weights of {before} are served again"
    updater.model_config.model_path = model_path
    updater.update_model_fields(
        model,
        model_path=model_path,
        load_format=load_format,
        load_config=LoadConfig(load_format=load_format),
    )
    return True, f"the weights of {model_path} are served"


def _on_every_rank(action: Callable[[], Any]) -> str:
    """What went wrong on this rank or on another; "" when `action` succeeded on all."""
    error = ""
    try:
        action()
    except (ConfigError, CheckpointError, OSError, ValueError, RuntimeError) as raised:
        error = str(raised) or type(raised).__name__
    group = get_parallel().tp_group
    if group.world_size > 1:
        errors: list[str] = [""] * group.world_size
        torch.distributed.all_gather_object(errors, error, group=group.cpu_group)
        error = next(filter(None, errors), "")
    return error
