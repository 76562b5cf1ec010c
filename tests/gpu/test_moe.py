"""moe on a GPU: released shapes, every form, routing of every kind, matrices past 2^31 bytes, the
reference on both devices, batches, graph replay, nothing that waits."""

from __future__ import annotations

import pytest
import torch
from expert_weights import LIMIT, any_matrix

from dsv4_plugin.ops import moe
from dsv4_plugin.runtime.compare import error, tolerance

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_inputs(tokens, experts, hidden, inner, form="fp4", topk=6, routing="uniform"):
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
    weights = torch.rand(tokens, topk, device=DEVICE) + 0.1
    chosen = torch.rand(tokens, experts, device=DEVICE).argsort(-1)[:, :topk].contiguous()
    if routing == "one expert":
        chosen.fill_(experts - 1)
    elif routing == "skewed":
        chosen = (torch.rand(tokens, topk, device=DEVICE) ** 4 * experts).long()
    shapes = (inner, hidden), (hidden, inner), (inner, hidden)
    return (
        x,
        weights,
        chosen,
        *(p for s in shapes for p in any_matrix(experts, *s, form, DEVICE)),
        LIMIT,
    )


def run(inputs, first: int = 0) -> torch.Tensor:
    return moe.implementations["triton"].load()(*inputs, first)


def check(inputs, rows: int = 48) -> None:
    """Some rows against the reference; the loop over experts takes the rest too long."""
    got = run(inputs)
    some = torch.linspace(0, len(got) - 1, min(rows, len(got)), device=DEVICE).long().unique()
    want = moe.reference(*(part[some] for part in inputs[:3]), *inputs[3:])
    assert error(got[some], want) <= tolerance("moe", torch.bfloat16).limit


@pytest.mark.parametrize("routing", ["uniform", "skewed", "one expert"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 1024, 8192])
def test_pro_tp8(tokens, routing):
    check(make_inputs(tokens, 384, 7168, 384, routing=routing))


@pytest.mark.parametrize("tokens", [1, 64, 4096])
@pytest.mark.parametrize("inner", [2048, 512, 256])
def test_flash_at_1_4_and_8_shares(tokens, inner):
    check(make_inputs(tokens, 256, 4096, inner))


@pytest.mark.parametrize("tokens", [3, 300])
def test_pro_ep8(tokens):
    """48 of 384 experts: most pairs belong to other processes."""
    inputs = list(make_inputs(tokens, 48, 7168, 3072))
    inputs[2] = torch.rand(tokens, 384, device=DEVICE).argsort(-1)[:, :6].contiguous()
    got, want = run(inputs, 96), moe.reference(*inputs, 96)
    assert error(got, want) <= tolerance("moe", torch.bfloat16).limit


@pytest.mark.parametrize("form", ["fp8", "fp8, fp32 scales", "bf16"])
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_other_forms(form, tokens):
    check(make_inputs(tokens, 64, 4096, 512, form))


def test_odd_sizes():
    check(make_inputs(37, 12, 384, 160, topk=3))
    assert run(make_inputs(0, 12, 384, 160)).shape == (0, 384)


def test_matrices_past_two_gigabytes():
    """The last of 600 experts lies behind 2^31 bytes of each matrix."""
    inputs = make_inputs(5, 600, 4096, 2048, routing="one expert")
    assert inputs[3].numel() > 1 << 31
    check(inputs)


def test_reference_is_that_of_the_cpu():
    inputs = make_inputs(9, 8, 512, 256)
    want = moe.reference(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in inputs))
    assert error(moe.reference(*inputs).cpu(), want) < 1e-2  # other bf16 products


@pytest.mark.parametrize("form", ["fp4", "fp8", "bf16"])
@pytest.mark.parametrize("tokens", [5, 700, 5000])
def test_a_row_has_the_same_bits_in_any_batch(form, tokens):
    x, weights, chosen, *rest = make_inputs(tokens, 32, 2048, 384, form)
    together = run((x, weights, chosen, *rest))
    for row in (0, tokens // 2, tokens - 1):
        at = slice(row, row + 1)
        assert torch.equal(run((x[at], weights[at], chosen[at], *rest))[0], together[row])


def test_what_is_no_number_stays_in_its_row():
    inputs = make_inputs(64, 32, 2048, 384)
    want = run(inputs)
    inputs[0][9, 100] = float("nan")
    got = run(inputs)
    others = torch.arange(64, device=DEVICE) != 9
    assert torch.equal(got[others], want[others]) and got[9].isnan().all()


@pytest.mark.parametrize("tokens", [64, 2048])
def test_graph_replay_equals_eager_and_nothing_waits(tokens):
    inputs = make_inputs(tokens, 32, 2048, 384)
    run(inputs)  # compiles before the capture
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(inputs)
    fresh = make_inputs(tokens, 32, 2048, 384, routing="skewed")
    for static, new in zip(inputs[:3], fresh[:3]):
        static.copy_(new)
    graph.replay()
    assert torch.equal(out, run(inputs))
