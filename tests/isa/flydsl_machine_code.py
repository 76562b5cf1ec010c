"""The experts in FlyDSL, executed as the machine code that an MI355X would load: all of the
operator, its Triton parts too. test_flydsl.py runs this file in a process of its own."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.modules.pop("flydsl", None)  # tests/conftest.py bars it from all other processes
pytest.importorskip("flydsl", reason="FlyDSL is not installed: pip install 'dsv4_plugin[flydsl]'")
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from expert_weights import LIMIT, TWO_CODES, decoded, expert, matrices, row_error  # noqa: E402

from dsv4_plugin.accuracy import gate  # noqa: E402
from dsv4_plugin.accuracy.eval_set import EvalSize, build_eval_set  # noqa: E402
from dsv4_plugin.config import Precision  # noqa: E402
from dsv4_plugin.kernels.flydsl import build, prepared  # noqa: E402
from dsv4_plugin.model import feed_forward  # noqa: E402
from gfx950 import flydsl_driver, hazards, triton_driver, wait_states  # noqa: E402
from gfx950.machine import Options  # noqa: E402
from gfx950.races import GlobalRaces, LocalRaces  # noqa: E402
from gfx950.scalar import wait_counts  # noqa: E402

build.compile_only("gfx950")  # before FlyDSL, which reads its environment when it is imported

from dsv4_plugin.kernels.flydsl import expert_kernels, products  # noqa: E402  isort: skip
from dsv4_plugin.kernels.flydsl.moe import moe  # noqa: E402  isort: skip

WATCHED = Options(watches=(LocalRaces, GlobalRaces))
ALONE = Options(seed=1, together=False, late=True)


def grid(width: int, blocks: int, gate_up: bool, **_) -> tuple[int, ...]:
    return width // 128 if gate_up else -(-width // 256), blocks, 1


def executing(options: Options = WATCHED, run: bool = True):
    """All forms of the products, whose kernels take the same."""
    kernel = expert_kernels.expert_kernel
    return flydsl_driver.executing(products.expert_product, kernel, grid, options, run)


def rounded_alike(x, weights, experts, parts, first: int) -> torch.Tensor:
    """fp32 [T, d] of experts that round inputs and hidden values as the kernels do."""
    out = torch.zeros(x.shape)
    for number in range(parts[0].shape[0]):
        token, choice = (experts == first + number).nonzero(as_tuple=True)
        if len(token):
            weight = weights[token, choice].unsqueeze(-1)
            part = expert(x[token], weight, *decoded(parts, number), rounded=True)
            out.index_add_(0, token, part.bfloat16().float())
    return out


@pytest.mark.parametrize("options", [WATCHED, ALONE], ids=["lockstep", "alone-late"])
@pytest.mark.parametrize(
    ("tokens", "experts", "inner", "wide", "topk", "first", "held"),
    [
        # one pass of the ring of each product, gates at the clamp
        pytest.param(5, 4, 256, 512, 2, 0, 4, id="small"),
        # a long loop, and a weight of one step
        pytest.param(3, 3, 128, 2048, 2, 0, 3, id="long"),
        # three steps and no loop, as Pro at TP8; blocks of 16 rows, full and in part
        pytest.param(24, 2, 384, 512, 2, 0, 2, id="full blocks"),
        # blocks of 64 rows, full and in part: four steps and three, and an expert that none chose
        pytest.param(80, 2, 384, 512, 2, 0, 2, id="many rows"),
        # a hidden size that half of a workgroup has nothing of, and no whole word of scales
        pytest.param(4, 4, 256, 128, 2, 0, 4, id="narrow"),
        pytest.param(40, 2, 128, 384, 2, 0, 2, id="narrow, many rows"),
        # a loop and two steps after it
        pytest.param(33, 1, 256, 1024, 1, 0, 1, id="many rows, long"),
        # experts of other processes, and slots that no block takes
        pytest.param(6, 8, 128, 1024, 3, 2, 3, id="absent experts"),
    ],
)
def test_machine_code_gives_the_bits_of_the_definition(
    options, tokens, experts, inner, wide, topk, first, held
):
    """Products of FP8 and FP4 with scales that are powers of two fit an fp32 sum, so another order
    of them changes a hidden value's FP8 rarely, and at these sizes and seeds never."""
    torch.manual_seed(tokens)
    parts = matrices(held, inner, wide, "fp4")
    x = (3 * torch.randn(tokens, wide)).bfloat16()
    chosen = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)])
    weights = torch.rand(tokens, topk)
    with triton_driver.executing(options=options), executing(options) as ran:
        got = moe(x, weights, chosen, *prepared.prepare(*parts), LIMIT, first)
    expected = rounded_alike(x, weights, chosen, parts, first)
    assert (got - expected).norm() <= 1e-6 * expected.norm()
    assert len(ran) == 2 and not [each for launch in ran for each in launch.told.findings]


@pytest.mark.parametrize(
    ("tokens", "inner", "wide"),
    [(5, 256, 128), pytest.param(3, 384, 1024, id="a loop, and three steps")],
)
def test_fp8_experts_of_base(tokens, inner, wide):
    """Scales are no powers of two: products of a step are rounded when they are scaled, so sums in
    another order put a hidden value on the next e4m3 now and then."""
    torch.manual_seed(tokens)
    parts = matrices(3, inner, wide, "fp8, fp32 scales")
    x = (3 * torch.randn(tokens, wide)).bfloat16()
    chosen = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2)
    with triton_driver.executing(options=WATCHED), executing() as ran:
        got = moe(x, weights, chosen, *prepared.prepare(*parts), LIMIT)
    expected = rounded_alike(x, weights, chosen, parts, 0)
    assert row_error(got, expected) <= TWO_CODES
    assert len(ran) == 2 and not [each for launch in ran for each in launch.told.findings]


def test_a_value_that_is_not_finite_stays_in_its_row():
    torch.manual_seed(3)
    parts = matrices(2, 128, 512, "fp4")
    x = torch.randn(6, 512).bfloat16()
    x[1, 7], x[4, 0] = float("nan"), float("inf")
    chosen, weights = torch.tensor([[0, 1]] * 6), torch.rand(6, 2)
    with triton_driver.executing(), executing():
        got = moe(x, weights, chosen, *prepared.prepare(*parts), LIMIT)
    wrong = torch.tensor([1, 4])
    assert got[wrong].isnan().all()
    right = torch.tensor([0, 2, 3, 5])
    expected = rounded_alike(x[right], weights[right], chosen[right], parts, 0)
    assert (got[right] - expected).norm() <= 1e-6 * expected.norm()


def test_nothing_of_no_tokens():
    parts = prepared.prepare(*matrices(2, 128, 512, "fp4"))
    none = torch.zeros(0, 2)
    got = moe(torch.zeros(0, 512).bfloat16(), none, none.long(), *parts, LIMIT)
    assert got.shape == (0, 512)


SIZES = {
    "Pro TP8": (384, 7168),
    "Pro EP8": (3072, 7168),
    "Flash TP1": (2048, 4096),
    "Flash TP8": (256, 4096),
}


@dataclass(frozen=True)
class Form:
    """Tokens of a call that takes it, and what its kernels must keep."""

    tokens: int
    registers: int
    products: int
    """Of a step of 128 channels and a wave."""
    ahead: int
    """Loads that every wait of the loop leaves on their way."""
    fp8: bool = False


FORMS = {
    # four waves a SIMD; three of four steps of seven loads, less those waited for one by one
    "few rows": Form(tokens=1, registers=128, products=4, ahead=20),
    # two workgroups a compute unit; two of three steps
    "many rows": Form(tokens=8, registers=256, products=16, ahead=14),
    # three waves a SIMD; one of two steps of eleven or twelve loads
    "FP8": Form(tokens=1, registers=168, products=4, ahead=11, fp8=True),
}


def empty(rows: int, columns: int, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of one expert and its scales."""
    if fp8:
        zeros = torch.zeros(1, rows, columns).to(torch.float8_e4m3fn)
        return zeros, torch.zeros(1, rows // 128, columns // 128)
    return (
        torch.zeros(1, rows, columns // 2, dtype=torch.int8),
        torch.zeros(1, rows, columns // 32, dtype=torch.float8_e8m0fnu),
    )


@pytest.fixture(scope="module", params=itertools.product(SIZES, FORMS), ids=", ".join)
def compiled(request):
    """(size, form, the two products of one expert of a released size)."""
    size, form = request.param[0], FORMS[request.param[1]]
    inner, wide = SIZES[size]
    shapes = (inner, wide), (wide, inner), (inner, wide)
    parts = [part for shape in shapes for part in empty(*shape, form.fp8)]
    x = torch.zeros(form.tokens, wide).bfloat16()
    weights, chosen = torch.zeros(form.tokens, 6), torch.zeros(form.tokens, 6, dtype=torch.int64)
    with triton_driver.executing(run=False), executing(run=False) as ran:
        moe(x, weights, chosen, *prepared.prepare(*parts), LIMIT)
    return size, form, [each.built for each in ran]


def test_registers_and_products_of_released_sizes(compiled):
    """Every product is the scaled one by FP8, none is repeated, nothing is spilled."""
    size, form, both = compiled
    inner, wide = SIZES[size]
    for built, inputs in zip(both, (wide, inner)):
        numbers = built.metadata
        assert numbers["vgpr_count"] + numbers["agpr_count"] <= form.registers
        assert numbers["vgpr_spill_count"] == numbers["sgpr_spill_count"] == 0
        assert numbers["private_segment_fixed_size"] == 0
        assert numbers["group_segment_fixed_size"] <= 163840 // 4
        products = [i for i in instructions(built) if "mfma" in i.name]
        assert {i.name for i in products} == {"v_mfma_scale_f32_16x16x128_f8f6f4"}
        steps = inputs // 128
        ring = min(steps, 4)  # of a loop, and what is left after it
        assert len(products) == form.products * (ring + (steps % 4 if steps >= 4 else 0))


def instructions(built):
    return triton_driver.program(built.hsaco, built.name).instructions.values()


def test_loads_stay_ahead_of_the_loop(compiled):
    """No wait inside it asks for the newest loads."""
    _, form, both = compiled
    for built in both:
        every = list(instructions(built))
        loops = [
            [i for i in every if back.target <= i.address <= back.address]
            for back in every
            if back.target is not None and back.target < back.address
        ]
        loops = [loop for loop in loops if any("mfma" in i.name for i in loop)]
        for loop in loops:
            waits = [wait_counts(i)[0] for i in loop if i.name == "s_waitcnt"]
            assert waits and min(waits) >= form.ahead


def test_nothing_is_used_before_it_arrived(compiled):
    for built in compiled[2]:
        program = triton_driver.program(built.hsaco, built.name)
        assert not hazards.check_waits(program) + wait_states.check_wait_states(program)


@pytest.mark.thorough
def test_the_trained_checkpoint_recalls_by_it(monkeypatch):
    """A step of four tokens, all experts in FlyDSL and the rest in references, gives the thing that
    was told 1,024 tokens before."""
    monkeypatch.setenv("DSV4_WEIGHTS", "packed")
    directory = gate.checkpoint_directory()
    engine = gate.load_engine(directory, Precision.SERVING, "cpu", max_tokens=4096)
    far = EvalSize(((1024, 1, 8),), windows=1, window=128)
    [asked] = build_eval_set(directory, engine.model.geometry.bos_token_id, far).documents[1024]
    at, (thing, *_) = asked.things[0]
    calls = []

    def by_machine_code(x, weights, experts, w1, s1, w2, s2, w3, s3, limit, first=0):
        calls.append(len(x))
        ready = prepared.prepare(w1, s1, w2, s2, w3, s3)
        with triton_driver.executing(), executing():
            return moe(x, weights, experts, *ready, limit, first)

    def answer(run) -> torch.Tensor:
        """Log-probabilities [vocab] of the thing."""
        sequence = engine.open()
        engine.forward([(sequence, asked.ids[: at - 4])])
        with mock.patch.object(feed_forward, "moe", run):
            streams = engine.forward([(sequence, asked.ids[at - 4 : at])])
        logits = engine.logits(streams[-1:])[0]
        engine.close(sequence)
        return logits.log_softmax(-1)

    with gate.selected(gate.REFERENCES):
        found, expected = answer(by_machine_code), answer(feed_forward.moe)
    assert calls == [4] * engine.model.geometry.num_hidden_layers
    assert found.argmax() == thing
    moved = (found.exp() * (found - expected)).sum()
    print(f"nats from the references: {moved:.2g}")
    assert abs(moved) < gate.MARGINS["divergence of things"].limit
