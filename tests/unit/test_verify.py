"""`dsv4 verify`: it finds what is wrong, on every operator, and says so; and what is compared is
what is defined."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

import dsv4_plugin.ops  # noqa: F401  registers the operators
from dsv4_plugin import flags
from dsv4_plugin.cli import main
from dsv4_plugin.ops.operator import OPERATORS, Implementation
from dsv4_plugin.runtime import cases, compare, ranks, verify

CPU = torch.device("cpu")
DECODE, PREFILL = 1, 2


def every_case(operator, step=None):
    for model in cases.MODELS:
        sizes = cases.sizes(model, CPU, quick=True)
        for size in sizes if step is None else sizes[step : step + 1]:
            yield from cases.cases(operator, size, CPU, seed=7)


@pytest.mark.parametrize("operator", flags.OPERATORS)
def test_the_reference_agrees_with_itself_on_fresh_equal_data(operator):
    """0 rows too. Arguments are equal each time, and a call that writes them does not disturb the
    next."""
    for case in every_case(operator):
        assert not any(
            compare.errors(
                OPERATORS[operator], OPERATORS[operator].reference, case.arguments(), {}
            )[1].values()
        )
        results = []
        for _ in range(2):
            arguments = case.arguments()
            result = OPERATORS[operator].reference(*arguments)
            results.append(
                compare.outcome(
                    OPERATORS[operator], result, compare.bound(OPERATORS[operator], arguments, {})
                )
            )
        assert results[0] and all(
            torch.equal(results[0][name].nan_to_num(), results[1][name].nan_to_num())
            for name in results[0]
        )


def spoiled(operator):
    """The operator with a mistake a kernel could have: one element of one row, or one index."""

    def run(*args, **kwargs):
        if operator in ("qk_norm_rope_store", "compress"):
            kind = (
                cases.PackedLatentCache
                if operator == "qk_norm_rope_store"
                else (cases.PackedLatentCache, cases.PackedIndexCache)
            )
            cache = next(arg for arg in args if isinstance(arg, kind))
            result = OPERATORS[operator].reference(*args, **kwargs)
            slots = (
                args[6] if operator == "qk_norm_rope_store" else args[2].slots[args[2].token >= 0]
            )
            if slots.numel():
                values = cache.load(slots)
                values[-1] = values[-1].roll(1)
                cache.store(slots, values)
            return result
        result = OPERATORS[operator].reference(*args, **kwargs)
        if operator == "build_step_plan":
            result.window[-1, -1] += 1
            return result
        first = result[0] if isinstance(result, tuple) else result
        flat = first.view(torch.uint8) if first.dtype == torch.float8_e4m3fn else first
        row = flat[-1]
        row.copy_(row.roll(1, -1) if first.is_floating_point() else row + 1)
        return result

    return run


@pytest.mark.parametrize("operator", flags.OPERATORS)
def test_one_wrong_row_exceeds_the_tolerance(operator):
    for case in every_case(operator, PREFILL):
        arguments = case.arguments()
        if operator == "compress" and not (arguments[2].token >= 0).any():
            continue
        _, found = compare.errors(OPERATORS[operator], spoiled(operator), arguments, {})
        assert max(found.values()) > compare.tolerance(operator, arguments[0].dtype).limit, (
            case.label,
            found,
        )


def test_error_of_rows_of_different_sizes():
    want = torch.tensor([[1000.0, 0.0], [0.0, 1.0]])
    assert compare.error(want + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), want) == pytest.approx(1e-3)
    assert compare.error(want + torch.tensor([[0.0, 0.0], [0.0, 1.0]]), want) == pytest.approx(1.0)
    assert compare.error(torch.full((2, 2), float("nan")), want) == float("inf")
    masked = torch.tensor([[1.0, float("-inf")]])
    assert compare.error(torch.tensor([[1.0, float("nan")]]), masked) == 0, (
        "what the reference leaves undefined"
    )
    assert compare.error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert compare.error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0 and compare.error(
        torch.zeros(1), torch.zeros(2)
    ) == float("inf")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """The command sets this for its own process; here it must go again."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def router(monkeypatch):
    """`route` with a `tilelang` that runs on a CPU and, unless mended, gives every token the
    weights of the next."""
    module = types.ModuleType("routers")

    def wrong(*args, **kwargs):
        weights, experts = OPERATORS["route"].reference(*args, **kwargs)
        return weights.roll(1, 0), experts

    def broken(*args, **kwargs):
        raise RuntimeError("out of LDS\nmore")

    module.wrong, module.broken = wrong, broken
    module.right = lambda *args, **kwargs: OPERATORS["route"].reference(*args, **kwargs)
    monkeypatch.setitem(sys.modules, "routers", module)
    monkeypatch.setattr(Implementation, "unavailable", lambda self: None)
    monkeypatch.setattr(OPERATORS["route"], "implementations", {})
    return lambda which: OPERATORS["route"].add(Implementation("tilelang", f"routers:{which}"))


def test_a_right_implementation_passes(router, capsys):
    router("right")
    assert main(["verify", "--quick", "--op", "route"]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 checks passed" in printed and "allowed 2e-02: ten roundings to bf16" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_wrong_one_fails_with_its_name_and_what_to_do(router, capsys):
    router("wrong")
    assert main(["verify", "--quick", "--op", "route", "--seed", "5"]) == 1
    out, err = capsys.readouterr()
    # with no rows there is nothing to be wrong
    assert "WRONG" in out and "2 of 6 checks passed" in out
    assert "route is wrong in tilelang" in err and "set DSV4_ROUTE=reference" in err


def test_one_that_raises_does_not_stop_the_others(router, capsys):
    router("broken")
    assert main(["verify", "--quick", "--op", "route", "--json"]) == 1
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(results) == 6 and all(
        result["note"] == "RuntimeError: out of LDS" for result in results
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--op", "moo"], "no operator 'moo'; did you mean moe?"),
        (["--arch", "gfx950"], "this machine is cpu, not gfx950"),
    ],
)
def test_wrong_input_is_one_line(arguments, named, capsys):
    assert main(["verify", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_the_whole_model_is_checked():
    from dsv4_plugin.runtime.verify import verify_model

    results = list(verify_model(CPU, seed=3))
    assert len(results) == 3 and all(result.passed for result in results)
    assert all(result.error < result.tolerance.limit for result in results[:1])


def test_references_are_held_against_the_cpus(monkeypatch):
    """As on a GPU, whose part another copy of the CPU plays."""
    found = list(verify.verify_references(list(flags.OPERATORS), CPU, seed=5))
    assert {result.subject for result in found} == set(flags.OPERATORS)
    assert all(result.passed and result.implementation == "reference" for result in found)
    calls = []

    def elsewhere_wrong(*arguments):
        calls.append(1)
        right = OPERATORS["mhc_head"].reference.right(*arguments)
        return right * 1.1 if len(calls) % 2 else right

    elsewhere_wrong.right = OPERATORS["mhc_head"].reference
    monkeypatch.setattr(OPERATORS["mhc_head"], "reference", elsewhere_wrong)
    monkeypatch.setattr(verify, "bound", lambda operator, each, _: {})
    found = list(verify.verify_references(["mhc_head"], CPU, seed=5))
    assert not any(result.passed for result in found if "0 rows" not in result.case)


def test_a_reference_that_is_wrong_on_a_device_is_no_way_out(capsys):
    from dsv4_plugin.cli.verify import _conclude

    wrong = verify.Result("moe", "reference", "pro decode", 0.5, compare.BF16)
    assert _conclude([wrong], ["moe"], 1, False) == 1
    error = capsys.readouterr().err
    assert "the reference of moe is wrong on this device" in error and "=reference" not in error


@pytest.mark.parametrize(("choices", "uneven", "passed"), [("first", 0, True), ("each", 3, False)])
def test_ranks_that_differ_are_wrong(monkeypatch, choices, uneven, passed):
    monkeypatch.setenv("DSV4_CHOICES", choices)
    outcome = ranks.Outcome(15, 120, uneven, torch.zeros(1, 1))
    asked = []

    def tried(size, layout, device, seed, runs):
        asked.append((size, layout, [run.choices for run in runs]))
        return [[outcome] * size for _ in runs]

    monkeypatch.setattr(verify, "try_ranks", tried)
    found = list(verify.verify_ranks(2, CPU, 1))
    assert asked == [(2, layout, [choices] * 2) for layout in ranks.GROUPS]
    assert [result.passed for result in found] == [passed] * 4
    assert sum("noise" in result.case for result in found) == 2
