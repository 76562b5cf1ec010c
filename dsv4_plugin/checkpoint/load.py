"""Released tensors into the parameters of a model: pairing, slicing for this process, and the
account of what came."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import Geometry
from ..parallel import Parallel, ParallelError
from .files import CheckpointError, CheckpointFiles, few, matches
from .schema import TensorSpec, expected_tensors

_DTYPE_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int8: "I8",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int64: "I64",
}


class Loader:
    """Fills `model` from released tensors that come in any order.

    `model` is a tree whose paths are the released names (`model.DeepseekV4`): matrices are modules
    with `load(weight, scale, expert)`, all others parameters. It may hold some parts of the model
    only, a part being the first component of a name (`layers`, `mtp`, `embed`, `norm`, ...);
    tensors of the other parts, and layers and routed experts of other processes, are skipped.
    Raises ParallelError when a share of `parallel` would cut a block of scales.
    """

    def __init__(self, model: nn.Module, geometry: Geometry, parallel: Parallel):
        parallel.check(geometry)
        self._model = model
        self._parallel = parallel
        self._expected = expected_tensors(geometry)
        self._experts = parallel.expert.slice(geometry.n_routed_experts)
        self._layers = parallel.stage(geometry)
        parts = {
            part for part in {name.split(".")[0] for name in self._expected} if _holds(model, part)
        }
        self._wanted = {
            name
            for name, spec in self._expected.items()
            if name.split(".")[0] in parts and self._holds_layer(name) and self._holds_expert(spec)
        }
        self._outstanding = set(self._wanted)
        self._halves: dict[str, Tensor] = {}
        for name, spec in self._expected.items():
            if name in self._wanted:
                self._check_share(spec)

    def _holds_layer(self, name: str) -> bool:
        part, _, rest = name.partition(".")
        return part != "layers" or int(rest.partition(".")[0]) in self._layers

    def _holds_expert(self, spec: TensorSpec) -> bool:
        return spec.expert is None or self._experts.start <= spec.expert < self._experts.stop

    def _check_share(self, spec: TensorSpec) -> None:
        if spec.shard is None:
            return
        size = getattr(self._parallel, spec.shard.group).size
        total = spec.shape[spec.shard.axis]
        if size > 1 and total % (size * spec.shard.unit):
            raise ParallelError(
                f"{spec.shard.group} parallel size {size} does not divide axis {spec.shard.axis} of"
                f" {spec.name} {list(spec.shape)} into whole multiples of {spec.shard.unit}"
            )

    def put(self, name: str, tensor: Tensor) -> None:
        """Takes one released tensor, whole, on any device.

        A quantised weight waits for its scale and the reverse. Raises CheckpointError for a name,
        dtype or shape that is not in the schema, and for a tensor that came before.
        """
        spec = self._expected.get(name)
        if spec is None:
            raise CheckpointError(
                f"{name} is not a tensor of this model; config.json and the weights must be of one"
                " release"
            )
        if name not in self._wanted:
            return
        dtype = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        if not matches(spec, dtype, tuple(tensor.shape)):
            raise CheckpointError(
                f"{name} is {dtype} {list(tensor.shape)}, not {spec.dtype} {list(spec.shape)}"
            )
        if name not in self._outstanding:
            raise CheckpointError(f"{name} came twice")
        self._outstanding.discard(name)
        self._store(spec, self._share(spec, tensor))

    def finish(self) -> None:
        """Ends the loading: modules that read their weights in another order prepare them. Raises
        CheckpointError that counts the tensors that never came and names the first few."""
        if self._outstanding:
            absent = [name for name in self._expected if name in self._outstanding]
            raise CheckpointError(f"{len(absent)} tensors never came: {few(absent)}")
        for module in self._model.modules():
            if prepare := getattr(module, "prepare", None):
                prepare()

    def _share(self, spec: TensorSpec, tensor: Tensor) -> Tensor:
        if spec.shard is None:
            return tensor
        share = getattr(self._parallel, spec.shard.group).slice(tensor.shape[spec.shard.axis])
        return tensor.narrow(spec.shard.axis, share.start, share.stop - share.start)

    def _store(self, spec: TensorSpec, tensor: Tensor) -> None:
        partner = spec.scale or spec.weight
        if partner is None:
            self._assign(spec, tensor)
        elif partner not in self._halves:
            self._halves[spec.name] = tensor
        else:
            other = self._halves.pop(partner)
            weight, scale = (tensor, other) if spec.scale else (other, tensor)
            self._load_matrix(self._expected[spec.weight or spec.name], weight, scale)

    def _load_matrix(self, spec: TensorSpec, weight: Tensor, scale: Tensor | None) -> None:
        path = spec.name.removesuffix(".weight")
        if spec.expert is None:
            self._model.get_submodule(path).load(weight, scale)
        else:
            # All local experts of one matrix are one module: experts.7.w1 -> experts.w1, entry 7.
            stacked = self._model.get_submodule(
                path.replace(f".experts.{spec.expert}.", ".experts.")
            )
            stacked.load(weight, scale, expert=spec.expert - self._experts.start)

    def _assign(self, spec: TensorSpec, tensor: Tensor) -> None:
        owner, _, leaf = spec.name.rpartition(".")
        module = self._model.get_submodule(owner)
        if leaf == "weight" and hasattr(module, "load"):
            self._load_matrix(spec, tensor, None)
            return
        parameter = self._model.get_parameter(spec.name)
        if parameter.shape != tensor.shape:
            raise CheckpointError(
                f"{spec.name}: this process's share is {list(tensor.shape)}, "
                f"its parameter {list(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(tensor)


def _holds(model: nn.Module, part: str) -> bool:
    held = getattr(model, part, None)
    return held is not None and not (
        isinstance(held, (nn.ModuleList, nn.ModuleDict)) and len(held) == 0
    )


def load_checkpoint(model: nn.Module, model_dir: str | Path) -> None:
    """Fills `model` (its `geometry` and `parallel`) from the checkpoint in `model_dir`.

    All headers are checked against the schema before the first weight is read. Raises
    CheckpointError or ParallelError.
    """
    files = CheckpointFiles(model_dir)
    files.check(model.geometry)
    loader = Loader(model, model.geometry, model.parallel)
    for name, tensor in files.tensors():
        loader.put(name, tensor)
    loader.finish()
