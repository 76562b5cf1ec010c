"""Parts, parameters and the resident forms of weights."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.checkpoint.schema import expected_tensors
from dsv4_plugin.config import Precision
from dsv4_plugin.formats import quantize_weight_fp4, quantize_weight_fp8
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.model.linear import Linear
from dsv4_plugin.runtime import Engine

CPU = torch.device("cpu")


def test_parameter_paths_are_the_released_names(golden_geometry):
    """Routed experts aside, which are stacked, and scales, which are decoded into their weights."""
    names = {name for name, _ in DeepseekV4(golden_geometry, Precision.EXACT).named_parameters()}
    released = {
        name.replace(f".experts.{spec.expert}.", ".experts.")
        for name, spec in expected_tensors(golden_geometry).items()
        if spec.weight is None
    }
    assert names == released


@pytest.mark.parametrize(
    "parts, has",
    [
        ("backbone", {"layers", "norm", "hc_head_fn"}),
        ("mtp", {"mtp"}),
        ("all", {"layers", "norm", "hc_head_fn", "mtp"}),
    ],
)
def test_parts(golden_geometry, golden_dir, parts, has):
    model = DeepseekV4(golden_geometry, Precision.EXACT, parts=parts)
    held = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert {"embed", "head"} <= held and held & {"layers", "norm", "hc_head_fn", "mtp"} == has
    load_checkpoint(model, golden_dir)


def test_backbone_and_mtp_apart_equal_the_whole(golden_geometry, golden_dir, golden):
    """The host keeps the two in two models with caches of their own."""
    prompt = golden["input_ids_2"].tolist()
    models = {}
    for parts in ("all", "backbone", "mtp"):
        models[parts] = DeepseekV4(golden_geometry, Precision.EXACT, parts=parts)
        load_checkpoint(models[parts], golden_dir)
    want = Engine(models["all"]).score_draft(prompt)
    target, draft = Engine(models["backbone"]), Engine(models["mtp"], page_seed=1)
    streams = target.forward([(target.open(), prompt)])
    with torch.inference_mode():
        plan = draft.plan([(draft.open(), len(prompt))])
        streams = models["mtp"].draft(torch.tensor([*prompt[1:], 0]), streams, plan, draft.caches)
        got = models["mtp"].logits(models["mtp"].mtp[0].collapse(streams))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "stored, quantize", [("fp8", quantize_weight_fp8), ("fp4", quantize_weight_fp4)]
)
def test_packed_and_dense_weights_compute_the_same(stored, quantize):
    weight, scale = quantize(torch.randn(256, 384))
    x = torch.randn(5, 384)
    packed = Linear(256, 384, stored, None, CPU)
    dense = Linear(256, 384, stored, torch.float32, CPU)
    for linear in (packed, dense):
        linear.load(weight, scale)
    assert packed.weight.dtype == weight.dtype and packed.scale is not None and dense.scale is None
    assert torch.equal(packed(x), dense(x))


def test_released_scales_decode_to_bf16_without_loss():
    """An e4m3 or e2m1 value times a power of two has 3 or 1 bits of fraction; bf16 has 7."""
    for stored, quantize in (("fp8", quantize_weight_fp8), ("fp4", quantize_weight_fp4)):
        pair = quantize(torch.randn(256, 256))
        exact, rounded = (
            Linear(256, 256, stored, dtype, CPU) for dtype in (torch.float32, torch.bfloat16)
        )
        exact.load(*pair)
        rounded.load(*pair)
        assert torch.equal(rounded.weight.float(), exact.weight)


def test_experts_are_loaded_one_by_one():
    stack = Linear(128, 256, "fp4", torch.float32, CPU, experts=3)
    pairs = [quantize_weight_fp4(torch.randn(128, 256)) for _ in range(3)]
    for expert in (2, 0, 1):
        stack.load(*pairs[expert], expert=expert)
    for expert, pair in enumerate(pairs):
        single = Linear(128, 256, "fp4", torch.float32, CPU)
        single.load(*pair)
        assert torch.equal(stack.weight[expert], single.weight)


@pytest.mark.parametrize(
    "precision, device, dtype",
    [
        ("exact", "cpu", torch.float32),
        ("official", "cpu", torch.float32),
        ("serving", "cpu", torch.float32),
        ("serving", "meta", torch.bfloat16),
    ],
)
def test_what_stays_in_fp32(golden_geometry, precision, device, dtype):
    model = DeepseekV4(golden_geometry, Precision(precision), device=device)
    always = ("hc_", "attn_sink", ".ape", "gate.bias")
    for name, parameter in model.named_parameters():
        if name.endswith("tid2eid"):
            assert parameter.dtype == torch.int64
        elif parameter.dtype.itemsize > 1:  # not packed
            assert parameter.dtype == (
                torch.float32 if any(part in name for part in always) else dtype
            ), name


@pytest.mark.parametrize("precision", ["exact", "serving"])
def test_activations_have_the_dtype_of_the_precision(golden_geometry, precision):
    """Whatever the weights are kept in."""
    model = DeepseekV4(golden_geometry, Precision(precision))
    assert model.embedded(torch.zeros(3, dtype=torch.int64)).dtype == model.dtype
    assert model.dtype == (torch.bfloat16 if precision == "serving" else torch.float32)
