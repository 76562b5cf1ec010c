"""The probe of a loaded model: it passes a sound one and names operator and layer of a broken
one."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter

import pytest
import torch

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.model.agreement import Seen
from dsv4_plugin.ops import operator as selection
from dsv4_plugin.ops.operator import HERE, OPERATORS, Implementation, Operator
from dsv4_plugin.runtime.probe import ProbeError, probe, prompt, sampled_layers


@pytest.fixture(scope="module")
def model(tiny_dir):
    model = DeepseekV4(Geometry.from_dir(tiny_dir), Precision.SERVING, parts="backbone")
    load_checkpoint(model, tiny_dir)
    return model


@pytest.fixture(autouse=True)
def fresh_selection():
    yield
    selection.configure()


def use(monkeypatch, operator, run):
    """Makes `run` the implementation in use of `operator`."""
    module = types.ModuleType("probed")
    module.run = run
    monkeypatch.setitem(sys.modules, "probed", module)
    monkeypatch.setattr(
        Implementation,
        "unavailable",
        lambda self: None if self.path == "probed:run" else "not here",
    )
    monkeypatch.setattr(OPERATORS[operator], "implementations", {})
    OPERATORS[operator].add(Implementation("triton", "probed:run"))
    monkeypatch.setenv(f"DSV4_{operator.upper()}", "triton")
    selection.configure()


def test_it_samples_every_kind_of_layer_and_the_last(model):
    geometry = model.geometry
    layers = sampled_layers(geometry)
    assert geometry.num_hidden_layers - 1 in layers
    kinds = {
        (geometry.compress_ratios[layer], geometry.is_hash_routed(layer))
        for layer in range(geometry.num_hidden_layers)
    }
    assert {
        (geometry.compress_ratios[layer], geometry.is_hash_routed(layer)) for layer in layers
    } == kinds
    assert len(prompt(geometry)) // 4 > geometry.index_topk


def test_references_alone_pass_with_nothing_compared(model):
    found = probe(model)
    assert found.calls == 0 and not found.compared


@pytest.mark.parametrize(
    "operator",
    [
        "sparse_mla",
        "compress",
        "qk_norm_rope_store",
        "moe",
        "route",
        "mhc_post_pre",
        "indexer_logits",
        "topk_select",
        "grouped_output",
    ],
)
def test_a_sound_implementation_passes_and_is_counted(model, monkeypatch, operator):
    use(
        monkeypatch,
        operator,
        lambda *args, **kwargs: OPERATORS[operator].reference(*args, **kwargs),
    )
    found = probe(model)
    assert found.compared == {operator: "triton"} and found.calls >= 2 and found.worst == 0.0


def test_the_host_loads_under_another_default_dtype(model, monkeypatch):
    use(
        monkeypatch,
        "compress",
        lambda *args, **kwargs: OPERATORS["compress"].reference(*args, **kwargs),
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert probe(model).calls > 0
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("operator", "layer"), [("sparse_mla", 2), ("mhc_pre", 0), ("route", 5)])
def test_a_broken_one_is_named_with_its_layer(model, monkeypatch, operator, layer):
    """Wrong in one layer only, by 10% of one thing it returns."""

    def run(*args, **kwargs):
        result = OPERATORS[operator].reference(*args, **kwargs)
        if HERE.layer != layer:
            return result
        return (result[0] * 1.1, *result[1:]) if isinstance(result, tuple) else result * 1.1

    assert layer in sampled_layers(model.geometry)
    use(monkeypatch, operator, run)
    with pytest.raises(
        ProbeError,
        match=(
            f"{operator} is wrong in layer {layer} during"
            f" prefill.*DSV4_{operator.upper()}=reference"
        ),
    ):
        probe(model)


def test_one_that_is_wrong_in_decode_only_is_found(model, monkeypatch):
    def run(*args, **kwargs):
        result = OPERATORS["sparse_mla"].reference(*args, **kwargs)
        return result * (0.5 if HERE.phase == "decode" else 1.0)

    use(monkeypatch, "sparse_mla", run)
    with pytest.raises(ProbeError, match="sparse_mla is wrong in layer 0 during decode"):
        probe(model)


def test_logits_that_are_not_finite_are_refused(model):
    sound = model.norm.weight.data.clone()
    model.norm.weight.data.fill_(float("nan"))
    try:
        with pytest.raises(ProbeError, match="not finite"):
            probe(model)
    finally:
        model.norm.weight.data.copy_(sound)


def test_the_probe_leaves_no_counts(model):
    selection.forget()
    probe(model)
    assert sum(row.calls for row in selection.report_rows()) == 0


def test_ranks_that_go_on_with_different_choices_stop_the_start(model, monkeypatch):
    @contextlib.contextmanager
    def watched():
        yield Seen(5, Counter({("experts", 3): 2}), {("experts", 3)})

    monkeypatch.setattr("dsv4_plugin.runtime.probe.watched", watched)
    with pytest.raises(ProbeError, match="2 rows of experts in layer 3.*Unset DSV4_CHOICES"):
        probe(model)


class TestWhatIsNamed:
    """`host/probe.py`: what was asked for by name runs before the server can be ready."""

    @pytest.fixture
    def on_gpu(self, monkeypatch):
        from dsv4_plugin import device

        monkeypatch.setattr(device, "arch", lambda: "gfx950")

    def run(self, monkeypatch, operator, run):
        from dsv4_plugin.host.probe import run_what_is_named

        use(monkeypatch, operator, run)
        monkeypatch.setattr(
            Operator, "_against", lambda _, implementation, *rest: (implementation.unavailable(), 1)
        )
        return run_what_is_named

    def test_it_runs_in_both_phases_and_counts_nothing(self, model, monkeypatch, on_gpu):
        phases = set()

        def select(*args):
            phases.add(HERE.phase)
            return OPERATORS["topk_select"].reference(*args)

        self.run(monkeypatch, "topk_select", select)(model)
        assert phases == {"prefill", "decode"}
        assert not selection.report_rows()

    def test_one_that_does_not_compile_ends_the_start_with_one_line(
        self, model, monkeypatch, on_gpu, capsys
    ):
        def fails(*args):
            raise type("CompilationError", (Exception,), {"__module__": "triton.x"})("no fp8 here")

        start = self.run(monkeypatch, "topk_select", fails)
        with pytest.raises(SystemExit) as ended:
            start(model)
        [line] = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        assert line.startswith("dsv4: error: DSV4_TOPK_SELECT=triton cannot run topk_select")
        assert "no fp8 here" in line

    def test_without_a_name_or_a_gpu_nothing_runs(self, monkeypatch):
        from dsv4_plugin.host.probe import run_what_is_named

        selection.configure()
        run_what_is_named(None)
        monkeypatch.setattr("dsv4_plugin.device.arch", lambda: "gfx950")
        run_what_is_named(None)
