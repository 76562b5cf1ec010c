"""Single deliberate mistakes must show against the golden answers: proof that those tests bite.

The golden README lists what such mistakes cost a float64 implementation. Here each is injected into
ours, and its figure must exceed the tolerance of the golden test by far.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module

import pytest
import torch

from dsv4_plugin.cache.step_plan import StepPlan
from dsv4_plugin.cache.stores import DenseIndexCache, DenseLatentCache
from dsv4_plugin.formats import round_to_fp4, round_to_fp8
from dsv4_plugin.model import attention, feed_forward, transformer
from dsv4_plugin.runtime import Engine, engine

from .golden import EXACT_MEAN, OFFICIAL_MEAN, differences, ids, show

STEP_PLAN = import_module("dsv4_plugin.ops.step_plan")
SEQUENCE = 1


def mean_difference(golden, model, name: str) -> float:
    d = differences(golden, SEQUENCE, Engine(model).score(ids(golden, SEQUENCE)), name)
    show("mistake", d)
    return d.mean().item()


def replace(monkeypatch, module, name: str, **changed) -> None:
    """Calls of the operator `name` in `module` get arguments changed by functions, by name or
    place."""
    run = getattr(module, name).reference
    names = run.__code__.co_varnames[: run.__code__.co_argcount]

    def mistaken(*args, **kwargs):
        arguments = dict(zip(names, args)) | kwargs
        for argument, change in changed.items():
            arguments[argument] = change(arguments[argument])
        return run(**arguments)

    monkeypatch.setattr(module, name, mistaken)


def change_plan(monkeypatch, ratio: int, **changed) -> None:
    """The part of every step plan that is about `ratio` gets fields changed by functions."""
    run = engine.build_step_plan

    def mistaken(*args, **kwargs):
        plan = run(*args, **kwargs)
        part = plan.compression[ratio]
        part = dataclasses.replace(
            part, **{name: change(getattr(part, name)) for name, change in changed.items()}
        )
        return dataclasses.replace(plan, compression={**plan.compression, ratio: part})

    monkeypatch.setattr(engine, "build_step_plan", mistaken)


def one_like(x):
    return torch.ones_like(x)


def first_half_absent(items):
    items = items.clone()
    items[:, :4] = -1
    return items


def no_sink(patch, model):
    replace(patch, attention, "sparse_mla", sink=lambda sink: torch.full_like(sink, -1e30))


def every_entry_selected(patch, model):
    replace(patch, attention, "topk_select", topk=lambda topk: 1 << 20)


def first_entries_selected(patch, model):
    replace(patch, attention, "topk_select", logits=torch.zeros_like)


def no_inverse_rope(patch, model):
    replace(patch, attention, "sparse_mla", cos=one_like, sin=torch.zeros_like)


def window_of_127(patch, model):
    patch.setattr(STEP_PLAN, "WINDOW", 127)


def window_of_129(patch, model):
    patch.setattr(STEP_PLAN, "WINDOW", 129)


def plain_rope_in_compressed_layers(patch, model):
    for ratio in (4, 128):
        patch.setitem(model._buffers, f"frequencies_{ratio}", model.frequencies_0)


def no_yarn(patch, model):
    theta = model.geometry.compress_rope_theta
    for ratio in (4, 128):
        patch.setitem(
            model._buffers, f"frequencies_{ratio}", theta ** -(torch.arange(0, 64, 2) / 64)
        )


def entries_rotated_at_their_last_token(patch, model):
    change_plan(patch, 4, position=lambda position: position + 3)


def dense_entries_rotated_at_their_last_token(patch, model):
    change_plan(patch, 128, position=lambda position: position + 127)


def no_overlap(patch, model):
    change_plan(patch, 4, step_row=first_half_absent, ring_row=first_half_absent)


def no_ape(patch, model):
    replace(patch, attention, "compress", ape=torch.zeros_like)


def mixing_transposed(patch, model):
    for operator in ("mhc_post", "mhc_post_pre"):
        replace(patch, transformer, operator, comb=lambda comb: comb.transpose(1, 2))


def one_sinkhorn_iteration(patch, model):
    for operator in ("mhc_pre", "mhc_post_pre"):
        replace(patch, transformer, operator, iterations=lambda iterations: 1)


def no_clamp(patch, model):
    for operator in ("moe", "shared_expert"):
        replace(patch, feed_forward, operator, swiglu_limit=lambda limit: 1e9)


def shared_expert_not_clamped(patch, model):
    replace(patch, feed_forward, "shared_expert", swiglu_limit=lambda limit: 1e9)


def no_routed_scaling(patch, model):
    replace(patch, feed_forward, "route", routed_scaling_factor=lambda factor: 1.0)


def hash_ignored(patch, model):
    replace(
        patch,
        feed_forward,
        "route",
        tid2eid=lambda table: None,
        bias=lambda bias: 0.0 if bias is None else bias,
    )


def experts_off_by_one(patch, model):
    replace(
        patch,
        feed_forward,
        "moe",
        experts=lambda experts: (experts + 1) % model.geometry.n_routed_experts,
    )


def groups_swapped(patch, model):
    replace(
        patch,
        attention,
        "grouped_output",
        weight=lambda weight: weight.roll(weight.shape[0] // 2, 0),
    )


def entry_visible_one_token_late(patch, model):
    patch.setattr(StepPlan, "visible", lambda plan, ratio: plan.position // ratio)


def index_queries_not_rotated(patch, model):
    replace(patch, attention, "rope_hadamard_quant", cos=one_like, sin=torch.zeros_like)


EXACT_MISTAKES = (
    no_sink,
    every_entry_selected,
    first_entries_selected,
    no_inverse_rope,
    window_of_127,
    window_of_129,
    plain_rope_in_compressed_layers,
    no_yarn,
    entries_rotated_at_their_last_token,
    dense_entries_rotated_at_their_last_token,
    no_overlap,
    no_ape,
    mixing_transposed,
    one_sinkhorn_iteration,
    no_clamp,
    shared_expert_not_clamped,
    no_routed_scaling,
    hash_ignored,
    experts_off_by_one,
    groups_swapped,
    entry_visible_one_token_late,
    index_queries_not_rotated,
)


@pytest.mark.parametrize("mistake", EXACT_MISTAKES, ids=lambda mistake: mistake.__name__)
def test_exact_notices(golden, golden_model, monkeypatch, mistake):
    model = golden_model("exact")
    mistake(monkeypatch, model)
    assert mean_difference(golden, model, "logits") > 100 * EXACT_MEAN


def latents_not_rounded(patch):
    patch.setattr(
        DenseLatentCache,
        "store",
        lambda cache, slots, values: cache.values.__setitem__(slots, values.float()),
    )


def whole_latent_rounded(patch):
    patch.setattr(
        DenseLatentCache,
        "store",
        lambda cache, slots, values: cache.values.__setitem__(
            slots, round_to_fp8(values.float(), 64)
        ),
    )


def keys_not_rounded(patch):
    patch.setattr(
        DenseIndexCache,
        "store",
        lambda cache, slots, values: cache.values.__setitem__(slots, values.float()),
    )


def keys_rounded_in_blocks_of_128(patch):
    patch.setattr(
        DenseIndexCache,
        "store",
        lambda cache, slots, values: cache.values.__setitem__(
            slots, round_to_fp4(values.float(), 128)
        ),
    )


def queries_not_rounded(patch):
    replace(patch, attention, "rope_hadamard_quant", rounding=lambda rounding: "none")


def keys_not_hadamard_rotated(patch):
    replace(patch, attention, "compress", rotate=lambda rotate: False)


OFFICIAL_MISTAKES = (
    latents_not_rounded,
    whole_latent_rounded,
    keys_not_rounded,
    keys_rounded_in_blocks_of_128,
    queries_not_rounded,
    keys_not_hadamard_rotated,
)


@pytest.mark.parametrize("mistake", OFFICIAL_MISTAKES, ids=lambda mistake: mistake.__name__)
def test_official_notices(golden, golden_model, monkeypatch, mistake):
    mistake(monkeypatch)
    assert mean_difference(golden, golden_model("official"), "logits_sim") > OFFICIAL_MEAN
