"""Where FP8 matrices stay packed (DSV4_WEIGHTS), and that joint matrices are the released ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.model.build import decoding_bytes, stays_packed
from dsv4_plugin.model.linear import Activation, Joint, Linear
from dsv4_plugin.ops import block_fp8_linear
from dsv4_plugin.parallel import Group, Parallel

PRO = load_geometry("pro")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def ranks(size: int) -> Parallel:
    group = Group(0, size)
    return Parallel(attention=group, expert_tensor=group, shared=group, vocab=group)


def test_decoding_bytes_of_pro():
    """docs/model.md §2, a layer: wq_a 11.0, wkv 3.7; of eight ranks an eighth of wq_b 100.7, wo_a
    67.1, wo_b 117.4 and of the shared expert's 66.1 million; 30 layers have the indexer's 12.6."""
    each = 11.0 + 3.7 + (100.7 + 67.1 + 117.4 + 66.1) / 8
    assert decoding_bytes(PRO, ranks(8)) / 1e6 == pytest.approx(61 * each + 30 * 12.6, rel=2e-3)


@pytest.fixture
def memory(monkeypatch):
    def put(gigabytes: int) -> None:
        properties = SimpleNamespace(total_memory=gigabytes << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: properties)

    return put


@pytest.mark.parametrize(
    "kernel, gigabytes, size, packed",
    [
        (True, 288, 8, True),  # a kernel reads them
        (False, 288, 8, False),  # 4 of 288 GB are less than a sixteenth
        (False, 288, 1, True),  # 24 are more
        (False, 48, 8, True),
    ],
)
def test_auto_on_a_gpu(kernel, gigabytes, size, packed, memory, monkeypatch):
    monkeypatch.delenv("DSV4_WEIGHTS", raising=False)
    monkeypatch.setattr(type(block_fp8_linear), "offers_kernel", lambda self: kernel)
    memory(gigabytes)
    assert stays_packed(PRO, ranks(size), GPU) is packed


def test_the_flag_decides(monkeypatch):
    assert not stays_packed(PRO, ranks(8), CPU)
    monkeypatch.setenv("DSV4_WEIGHTS", "packed")
    assert stays_packed(PRO, ranks(8), CPU)
    monkeypatch.setenv("DSV4_WEIGHTS", "dense")
    assert not stays_packed(PRO, ranks(8), GPU)


def test_safe_asks_for_no_kernel(monkeypatch):
    monkeypatch.setenv("DSV4_PROFILE", "safe")
    assert not block_fp8_linear.offers_kernel()


@pytest.mark.parametrize("dense", [torch.float32, None])
def test_joint_matrices_load_and_multiply_as_single_ones(dense):
    from dsv4_plugin.formats import quantize_weight_fp8

    two = [Linear(rows, 256, "fp8", dense, CPU) for rows in (128, 64)]
    joint = Joint(*two)
    weights = [torch.randn(rows, 256) for rows in (128, 64)]
    for linear, weight in zip(two, weights):
        linear.load(*quantize_weight_fp8(weight))
    x = torch.randn(3, 256)
    # sums of other lengths
    for got, linear in zip(joint(Activation(x)), two):
        torch.testing.assert_close(got, linear(x), rtol=1e-5, atol=1e-4)


def test_a_block_of_scales_belongs_to_one_matrix():
    two = [Linear(rows, 256, "fp8", None, CPU) for rows in (64, 128)]
    with pytest.raises(ValueError, match="a block of 128 rows has one scale"):
        Joint(*two)
