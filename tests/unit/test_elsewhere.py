"""Copies of arguments on another device, here the CPU again: what shares memory shares it there."""

from __future__ import annotations

import torch

from dsv4_plugin.cache import PackedIndexCache, PackedLatentCache, index_page_bytes
from dsv4_plugin.cache.layout import latent_page_bytes
from dsv4_plugin.ops.operator import OPERATORS
from dsv4_plugin.runtime import compare
from dsv4_plugin.runtime.cases import cases, sizes
from dsv4_plugin.runtime.elsewhere import Elsewhere

CPU = torch.device("cpu")


def test_strides_and_shared_memory_are_kept():
    base = torch.arange(24.0).view(4, 6)
    view, turned, spread = base[1:, 2:5], base.t(), base[0].expand(3, 6)
    there = Elsewhere(CPU)
    base_, (view_, turned_), spread_ = there([base, (view, turned), {"x": spread}])
    assert torch.equal(view_, view) and view_.stride() == view.stride()
    assert turned_.stride() == (1, 6) and spread_["x"].stride() == (0, 1)
    base_[1, 2] = -1
    assert view_[0, 0] == -1 and turned_[2, 1] == -1 and base[1, 2] == 8
    there.bring_back()
    assert view[0, 0] == -1


def test_bits_survive_and_other_values_pass():
    nan = torch.full((2, 3), -1, dtype=torch.int32).view(torch.float32)
    fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    there = Elsewhere(CPU)
    copies = there({"nan": nan, "fp8": fp8, "word": "fp8", "none": None, "empty": nan[:0]})
    assert torch.equal(copies["nan"].view(torch.int32), nan.view(torch.int32))
    assert torch.equal(copies["fp8"].view(torch.uint8), fp8.view(torch.uint8))
    assert copies["word"] == "fp8" and copies["none"] is None and copies["empty"].shape == (0, 3)


def test_stores_keep_their_views():
    pages = torch.zeros(3, latent_page_bytes(64), dtype=torch.uint8)
    cache, index = (
        PackedLatentCache(pages, 64),
        PackedIndexCache(pages.new_zeros(2, index_page_bytes())),
    )
    there = Elsewhere(CPU)
    copy, _ = there((cache, index))
    copy.store(torch.tensor([70]), torch.ones(1, 512))
    assert (copy.load(torch.tensor([70])) == 1).all() and (pages == 0).all()
    there.bring_back()
    assert (cache.load(torch.tensor([70])) == 1).all()


def test_every_operator_gives_the_same_on_copies():
    size = sizes("pro", CPU, quick=True)[2]
    for name, operator in OPERATORS.items():
        for case in cases(name, size, CPU, seed=2):
            given, copied = case.arguments(), Elsewhere(CPU)(case.arguments())
            outcomes = [
                compare.outcome(
                    operator, operator.reference(*each), compare.bound(operator, each, {})
                )
                for each in (given, copied)
            ]
            for part in outcomes[0]:
                assert torch.equal(outcomes[0][part].nan_to_num(), outcomes[1][part].nan_to_num())
