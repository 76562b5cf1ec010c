"""All weights of a checkpoint are served or none, on every rank."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dsv4_plugin.checkpoint.load import Loader, load_checkpoint
from dsv4_plugin.config import Precision
from dsv4_plugin.host import weight_update
from dsv4_plugin.host.model import DeepseekV4ForCausalLM
from dsv4_plugin.model import DeepseekV4

NAME = "layers.0.attn_norm.weight"


@pytest.fixture
def other_dir(golden_dir, tmp_path):
    """The golden checkpoint with one other norm."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden_dir / name, tmp_path / name)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[NAME] = tensors[NAME] * 2
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def updater(golden_dir, golden_geometry, monkeypatch):
    """A worker's updater around the golden model, on one rank."""
    group = SimpleNamespace(world_size=1)
    monkeypatch.setattr(weight_update, "get_parallel", lambda: SimpleNamespace(tp_group=group))
    wrapper = DeepseekV4ForCausalLM.__new__(DeepseekV4ForCausalLM)
    nn.Module.__init__(wrapper)
    wrapper.model = DeepseekV4(golden_geometry, Precision.EXACT)
    load_checkpoint(wrapper.model, golden_dir)
    wrapper.cached_layers = range(golden_geometry.num_hidden_layers)
    served = []
    return SimpleNamespace(
        model=wrapper.model,
        get_model=lambda: wrapper,
        model_config=SimpleNamespace(model_path=str(golden_dir), revision=None),
        update_model_fields=lambda model, **fields: served.append(fields["model_path"]),
        served=served,
    )


def norm(updater) -> torch.Tensor:
    return updater.model.get_parameter(NAME).clone()


def test_new_weights_are_served(updater, other_dir):
    before = norm(updater)
    done, sentence = weight_update.update_weights_from_disk(updater, str(other_dir), "auto")
    assert done and str(other_dir) in sentence and updater.served == [str(other_dir)]
    assert torch.equal(norm(updater), before * 2)


def test_another_model_changes_nothing(updater, tiny_dir, monkeypatch):
    monkeypatch.setattr(Loader, "put", lambda *arguments: pytest.fail("a weight was touched"))
    done, sentence = weight_update.update_weights_from_disk(updater, str(tiny_dir), "auto")
    assert not done and "another model than the one that is served" in sentence
    assert updater.served == [] and updater.model_config.model_path != str(tiny_dir)


def test_files_that_cannot_be_read_to_the_end_leave_what_was_served(
    updater, other_dir, monkeypatch
):
    before, put, seen = norm(updater), Loader.put, []

    def broken(loader, name, tensor):
        seen.append(name)
        if len(seen) == 200:
            raise OSError("the disk has gone")
        put(loader, name, tensor)

    monkeypatch.setattr(Loader, "put", broken)
    done, sentence = weight_update.update_weights_from_disk(updater, str(other_dir), "auto")
    assert not done and "the disk has gone" in sentence and "served again" in sentence
    assert NAME in seen[:200]  # it had been overwritten
    assert torch.equal(norm(updater), before) and updater.served == []


def test_what_fails_on_another_rank_is_not_served_here(updater, other_dir, monkeypatch):
    before = norm(updater)
    group = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr(weight_update, "get_parallel", lambda: SimpleNamespace(tp_group=group))

    def gather(errors, error, group):
        errors[:] = [error, "no such file on the other node"]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    done, sentence = weight_update.update_weights_from_disk(updater, str(other_dir), "auto")
    assert (done, sentence) == (False, "no such file on the other node")
    assert torch.equal(norm(updater), before)
