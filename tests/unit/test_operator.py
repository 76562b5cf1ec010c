"""Selection of an operator's implementation: keys, reasons, forced ones, counts, and what a call
costs."""

from __future__ import annotations

import enum
import sys
import time
import timeit
import types
import typing
from typing import Literal, Optional, TypeAlias

import pytest
import torch

import dsv4_plugin.ops  # noqa: F401  registers the operators
from dsv4_plugin import device, flags
from dsv4_plugin.ops import operator as selection
from dsv4_plugin.ops.operator import HERE, Implementation, SelectionError


def doubled(x, w=None, rounding: str = "none"):
    """What the test operator's other implementation computes, told apart by its doubled result."""
    return x * 2


@pytest.fixture
def place():
    before = HERE.phase, HERE.layer, HERE.ratio
    yield HERE
    HERE.phase, HERE.layer, HERE.ratio = before


@pytest.fixture
def moe(monkeypatch, place):
    """An operator named as one of the table, in a registry of its own, whose `triton` doubles and
    refuses 4 rows or more."""
    monkeypatch.setattr(selection, "OPERATORS", {})
    module = types.ModuleType("doubling")
    module.doubled = doubled
    monkeypatch.setitem(sys.modules, "doubling", module)

    @selection.operator
    def moe(x, w=None, rounding: str = "none"):
        return x * 1

    moe.add(
        Implementation(
            "triton",
            "doubling:doubled",
            requires=lambda x, w=None, rounding="none": (
                "too many rows" if x.shape[0] >= 4 else "weights are missing" if w is None else None
            ),
        )
    )
    return moe


@pytest.fixture
def on_gpu(monkeypatch):
    """The selection of a machine whose GPU is gfx950; the tensors stay on the CPU, which one test
    below is about."""
    monkeypatch.setattr(device, "arch", lambda: "gfx950")


class Resident(torch.Tensor):
    """A CPU tensor that says it is on the GPU, for the rules that follow once it is."""

    @property
    def is_cuda(self):
        return True


def rows(count, resident=True):
    x = torch.ones(count, 2)
    return x.as_subclass(Resident) if resident else x


def test_without_a_gpu_the_reference_runs_and_says_why(moe):
    moe.configure()
    assert moe(rows(2, resident=False), torch.ones(1)).sum() == 4
    [row] = selection.report_rows()
    assert (row.implementation, row.calls, row.fallback) == ("reference", 1, False)
    assert row.rejected == {"triton": "there is no GPU"}


def test_auto_takes_what_can_run_and_reports_each_fallback_by_shape_class(
    moe, on_gpu, place, caplog
):
    moe.configure()
    place.phase, place.layer, place.ratio = "decode", 3, 128
    w = torch.ones(1)
    for count in (2, 3, 4, 2, 0):
        result = moe(rows(count), w)
        assert result.shape[0] == count
    assert moe(rows(3), w).sum() == 12 and moe(rows(4), w).sum() == 8
    seen = {
        (row.phase, row.layer_kind, row.rows): (
            row.implementation,
            row.calls,
            row.rejected,
            row.fallback,
        )
        for row in selection.report_rows()
    }
    assert seen == {
        ("decode", "c128", "2-3"): ("triton", 4, {}, False),
        ("decode", "c128", "4-7"): ("reference", 2, {"triton": "too many rows"}, True),
        ("decode", "c128", "0"): ("triton", 1, {}, False),
    }
    assert "moe runs its reference in decode" in caplog.text


def test_none_tensors_and_words_of_a_call_have_choices_of_their_own(moe, on_gpu):
    moe.configure()
    x = rows(2)
    assert moe(x, torch.ones(1)).sum() == 8
    assert moe(x, None).sum() == 4, (
        "without weights the same shape must not find the choice made with weights"
    )
    assert moe(x=x, w=torch.ones(1)).sum() == 8
    (
        moe(x, torch.ones(1), "fp4"),
        moe(x, torch.ones(1), rounding="fp8"),
        moe(x, torch.ones(1), rounding="fp4"),
    )
    assert len(moe.choices) == 6


def test_tensors_on_the_cpu_of_a_gpu_machine_take_the_reference(moe, on_gpu):
    moe.configure()
    moe(rows(2), torch.ones(1))
    assert moe(rows(2, resident=False), torch.ones(1)).sum() == 4
    assert selection.report_rows()[1].rejected == {"triton": "the tensors are not on the GPU"}


def test_layers_leave_the_others_to_the_reference(moe, on_gpu, place, monkeypatch):
    monkeypatch.setenv("DSV4_LAYERS_MOE", "0-1,5")
    moe.configure()
    taken = {}
    for place.layer in range(7):
        taken[place.layer] = moe(rows(2), torch.ones(1)).sum().item()
    assert taken == {0: 8, 1: 8, 2: 4, 3: 4, 4: 4, 5: 8, 6: 4}
    [out] = [row for row in selection.report_rows() if row.implementation == "reference"]
    assert out.rejected == {"triton": "DSV4_LAYERS_MOE leaves this layer out"}


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"DSV4_MOE": "triton"}, ["DSV4_MOE=triton cannot run here", "there is no GPU"]),
        (
            {"SGLANG_FORCE_TRITON_MOE_FP8": "1"},
            ["DSV4_MOE=triton (from SGLANG_FORCE_TRITON_MOE_FP8=1)", "there is no GPU"],
        ),
    ],
)
def test_what_is_forced_and_cannot_run_stops_the_start(moe, monkeypatch, environ, named):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SelectionError) as error:
        selection.configure()
    for part in named:
        assert part in str(error.value)


def test_what_is_not_there_is_no_value(moe, monkeypatch):
    monkeypatch.setenv("DSV4_MOE", "aiter")
    with pytest.raises(flags.FlagError, match="DSV4_MOE='aiter'.*auto or reference or triton"):
        selection.configure()


def test_a_profile_yields_with_a_word_where_it_cannot_be_followed(moe, on_gpu, monkeypatch, caplog):
    monkeypatch.setitem(flags.profiles()["2026-05-02"]["operators"], "moe", "absent")
    moe.add(Implementation("absent", "m:f", packages=("no_such_package",)))
    monkeypatch.setenv("DSV4_PROFILE", "2026-05-02")
    moe.configure()
    assert caplog.messages == [
        "dsv4_plugin: DSV4_MOE=absent (from DSV4_PROFILE=2026-05-02): package no_such_package is"
        " not installed; auto decides"
    ]
    assert moe(rows(2), torch.ones(1)).sum() == 8
    monkeypatch.setenv("DSV4_PROFILE", "safe")
    moe.configure()
    assert moe(rows(2), torch.ones(1)).sum() == 4


def test_what_is_forced_never_falls_back_on_a_shape(moe, on_gpu, monkeypatch):
    monkeypatch.setenv("DSV4_MOE", "triton")
    selection.configure()
    assert moe(rows(2), torch.ones(1)).sum() == 8
    with pytest.raises(
        SelectionError, match="DSV4_MOE=triton cannot run this call of moe: too many rows"
    ):
        moe(rows(4), torch.ones(1))


def test_missing_package_and_foreign_arch_are_reasons(monkeypatch):
    monkeypatch.setattr(device, "arch", lambda: "gfx942")
    absent = Implementation("aiter", "m:f", packages=("no_such_package",))
    assert absent.unavailable() == "package no_such_package is not installed"
    other = Implementation("triton", "m:f", archs=("gfx950", "sm_"))
    assert other.unavailable() == "gfx942 is not one of gfx950, sm_"


class CompilationError(Exception):
    """Named, and placed, as Triton's."""

    __module__ = "triton.compiler.errors"


def breaking(error):
    def run(x, w=None, rounding: str = "none"):
        raise error

    return run


@pytest.fixture
def gluon(moe, monkeypatch):
    """A function that puts an implementation `gluon` before the others of `moe`, which raises."""

    def put(error):
        module = types.ModuleType("broken")
        module.run = breaking(error)
        monkeypatch.setitem(sys.modules, "broken", module)
        others, moe.implementations = moe.implementations, {}
        moe.add(Implementation("gluon", "broken:run"))
        moe.implementations.update(others)
        moe.configure()

    return put


def test_what_does_not_compile_is_given_up_once_logged_and_counted(moe, gluon, on_gpu, caplog):
    gluon(CompilationError("at 3:4:\n    y = x.to(float8)\n        ^\nno such type here"))
    w = torch.ones(1)
    for count in (2, 3, 2, 1):
        assert moe(rows(count), w).sum() == 4 * count
    assert moe(rows(4), w).sum() == 8
    reason = "it does not compile for gfx950: no such type here"
    assert caplog.messages[0] == f"dsv4_plugin: moe goes on without gluon: {reason}"
    assert len(caplog.messages) == 2 and "moe runs its reference" in caplog.messages[1]
    assert {
        (row.rows, row.implementation, row.calls, row.fallback, row.rejected["gluon"])
        for row in moe.rows()
    } == {
        ("2-3", "triton", 3, True, reason),
        ("1", "triton", 1, True, reason),
        ("4-7", "reference", 1, True, reason),
    }
    moe.configure()
    assert not moe._given_up, "a fresh configuration tries again"


def test_one_that_stops_compiling_keeps_what_it_served_in_the_report(
    moe, gluon, on_gpu, monkeypatch
):
    """The first shapes run; a later variant does not compile."""
    gluon(None)
    works, fails = (lambda x, *rest: x * 3), breaking(CompilationError("too large"))
    monkeypatch.setattr(
        sys.modules["broken"],
        "run",
        lambda x, *rest: (works if x.shape[0] < 3 else fails)(x, *rest),
    )
    w = torch.ones(1)
    assert [moe(rows(count), w).sum().item() for count in (1, 2, 3, 2, 1)] == [6, 12, 12, 8, 4]
    assert {(row.rows, row.implementation): row.calls for row in moe.rows()} == {
        ("1", "gluon"): 1,
        ("2-3", "gluon"): 1,
        ("2-3", "triton"): 2,
        ("1", "triton"): 1,
    }


def test_what_is_named_and_does_not_compile_is_an_error(moe, gluon, on_gpu, monkeypatch):
    monkeypatch.setenv("DSV4_MOE", "gluon")
    gluon(CompilationError("no such type here"))
    assert moe.named
    with pytest.raises(SelectionError, match="DSV4_MOE=gluon cannot run moe: .*no such type here"):
        moe(rows(2), torch.ones(1))


def test_other_errors_are_nobodys_fall_back(moe, gluon, on_gpu):
    gluon(RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        moe(rows(2), torch.ones(1))


def test_what_cannot_be_loaded_is_given_up_or_refused_at_start(moe, on_gpu, monkeypatch, caplog):
    """As a kernel for another Triton, whose module has other names."""
    moe.implementations = {
        "gluon": Implementation("gluon", "doubling:no_such_name"),
        **moe.implementations,
    }
    moe.configure()
    assert moe(rows(2), torch.ones(1)).sum() == 8
    [row] = moe.rows()
    assert row.fallback and "cannot be loaded" in row.rejected["gluon"]
    monkeypatch.setenv("DSV4_MOE", "gluon")
    with pytest.raises(SelectionError, match="DSV4_MOE=gluon cannot run here: it cannot be loaded"):
        moe.configure()


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("sm_80", "sm_80 has no FP8 e4m3; sm_89 and later have"),
        ("sm_86", "sm_86 has no FP8 e4m3; sm_89 and later have"),
        ("sm_89", None),
        ("sm_100", None),
        ("gfx942", None),
        ("gfx1100", None),
    ],
)
def test_kernels_with_fp8_say_which_gpu_lacks_it(monkeypatch, arch, reason):
    monkeypatch.setattr(device, "arch", lambda: arch)
    kernels = {
        name: operator.implementations["triton"].unavailable()
        for name, operator in selection.OPERATORS.items()
        if "triton" in operator.implementations
    }
    for name in ("compress", "indexer_logits", "qk_norm_rope_store", "rope_hadamard_quant"):
        assert kernels[name] == reason, name
    for name in ("build_step_plan", "sparse_mla", "topk_select"):
        assert kernels[name] is None, name


def test_observers_run_every_call_and_leave_no_trace(moe, on_gpu):
    moe.configure()
    x, w = rows(2), torch.ones(1)
    moe(x, w)
    seen = []

    def observer(operator, choice, *args, **kwargs):
        seen.append((operator.name, choice.implementation))
        return choice.run(*args, **kwargs)

    with selection.observed(observer):
        assert moe(x, w).sum() == 8 and moe(x, w).sum() == 8
    assert seen == [("moe", "triton")] * 2
    moe(x, w)
    assert [row.calls for row in selection.report_rows()] == [2] and len(seen) == 2


def test_a_stream_of_shapes_keeps_memory_bounded_and_choices_right(moe, on_gpu, monkeypatch):
    monkeypatch.setattr(selection, "_REMEMBERED", 8)
    moe.configure()
    w = torch.ones(1)
    for count in [*range(40), *range(40)]:
        assert moe(rows(count), w).sum() == 2 * count * (2 if count < 4 else 1)
    assert len(moe._found) <= 8 and len(moe.choices) == 7
    assert sum(row.calls for row in selection.report_rows()) == 80


def test_growing_contexts_share_the_choices_of_their_ranges(place):
    """Thousands of row lengths of `topk_select`, as a server meets them one after another."""
    topk_select = selection.OPERATORS["topk_select"]
    topk_select.configure()
    place.phase, place.layer, place.ratio = "decode", 2, 4
    for entries in range(4000):
        topk_select(torch.zeros(1, entries), torch.tensor([entries]), 2)
    assert len(topk_select.choices) == 13, "0, 1, 2-3, … 2048-4095"
    rows = topk_select.rows()
    assert len(rows) == 13 and sum(row.calls for row in rows) == 4000
    assert rows[-1].tensor == "float32 x2048-4095 on cpu" and rows[-1].calls == 4000 - 2048
    topk_select.forget()


def test_shapes_without_end_keep_the_choices_bounded_and_every_call_counted(
    moe, on_gpu, monkeypatch, caplog
):
    """An operator whose other dimensions vary although it does not say so."""
    monkeypatch.setattr(selection, "_MOST_CHOICES", 8)
    moe.configure()
    w = torch.ones(1)
    for width in range(100):
        for count in (1, 4):
            moe(torch.ones(count, width).as_subclass(Resident), w)
        assert len(moe.choices) <= 8 and len(moe.rows()) <= 10
    counted = {}
    for row in moe.rows():
        key = row.implementation, tuple(row.rejected.items()), row.fallback
        counted[key] = counted.get(key, 0) + row.calls
    assert counted == {
        ("triton", (), False): 100,
        ("reference", (("triton", "too many rows"),), True): 100,
    }
    assert {row.rows for row in moe.rows()} == {"any", "1", "4-7"}
    assert sum("starts choosing anew" in message for message in caplog.messages) == 1
    assert sum("runs its reference" in message for message in caplog.messages) == 1


def test_reasons_without_end_are_bounded_too(moe, on_gpu, monkeypatch):
    monkeypatch.setattr(selection, "_MOST_CHOICES", 8)
    moe.add(Implementation("triton", "doubling:doubled", requires=lambda x, w: f"{x.shape[1]}"))
    moe.configure()
    for width in range(100):
        moe(torch.ones(1, width).as_subclass(Resident), None)
    assert len(moe.rows()) <= 17 and sum(row.calls for row in moe.rows()) == 100


class Rounding(enum.Enum):
    FP8 = 8
    FP4 = 4


Word: TypeAlias = Literal["even", "zero"]


def declared(
    x,
    a: str,
    b: str | None,
    c: Optional[torch.dtype],  # noqa: UP045  an older spelling of the same
    d: Rounding,
    e: Word,
    f: bool,
    g: int,
    h: torch.Tensor | None,
):
    return x


@pytest.mark.parametrize("strings", [True, False])
def test_arguments_are_told_apart_by_value_however_they_are_declared(moe, strings):
    reference = types.FunctionType(declared.__code__, declared.__globals__, "declared")
    reference.__annotations__ = (
        dict(declared.__annotations__) if strings else typing.get_type_hints(declared)
    )
    operator = selection.Operator(reference)
    assert operator._by_value == (1, 2, 3, 4, 5, 6)
    x = torch.ones(1)
    words = ("s", None, torch.float32, Rounding.FP8, "even", True)
    others = ("t", "u", torch.float16, Rounding.FP4, "zero", False)
    operator._forced = flags.Setting("reference")
    operator(x, *words, 3, None)
    operator(x, *words, 4, None)
    assert len(operator.choices) == 1
    for at in range(6):
        operator(x, *words[:at], others[at], *words[at + 1 :], 3, None)
    assert len(operator.choices) == 7 and len(operator._found) == 7


def test_choosing_costs_no_more_than_a_few_small_torch_calls():
    """Microseconds depend on the machine and its load; a torch call timed in turn with it, best of
    many, does so alike.

    About twice the smallest call on an idle core as on a busy one; choosing anew at each call would
    be tens of times.
    """
    x, w = torch.ones(5, 64, dtype=torch.bfloat16), torch.ones(64)
    empty = selection.Operator(lambda x, *rest: None)
    selection.OPERATORS.pop(empty.name)

    def seconds(call):
        return timeit.timeit(call, number=2000, timer=time.thread_time)

    pairs = [
        (seconds(lambda: empty(x, w, w, None, x, 6, 2.5)), seconds(lambda: torch.empty_like(x)))
        for _ in range(50)
    ]
    choosing, smallest = (min(column) for column in zip(*pairs, strict=True))
    assert choosing < 6 * smallest


def test_calls_of_a_captured_graph_count_when_it_is_replayed(moe):
    """Not when it is captured, which serves nobody; the last of the warm-ups and captures
    counts."""
    x, calls = torch.ones(2), selection.Calls()
    moe(x)
    for _ in range(3):
        with calls.counted():
            moe(x)
            moe(x)
    assert sum(choice.calls for choice in moe.choices.values()) == 1
    calls.add()
    calls.add()
    assert sum(choice.calls for choice in moe.choices.values()) == 1 + 2 * 2
