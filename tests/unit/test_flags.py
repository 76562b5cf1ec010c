"""The table of switches: precedence, names of others, contradictions, and the document made from
it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import dsv4_plugin.host.kernels  # noqa: F401  all operators' implementations, the values of flags
from dsv4_plugin import flags
from dsv4_plugin.flags import FlagError, check, implementation, layers, setting
from dsv4_plugin.flags_document import markdown

ROOT = Path(__file__).parents[2]
DATES = ["2026-04-25", "2026-05-02", "2026-05-04", "2026-05-10", "2026-05-21"]


def test_nothing_set_is_auto_everywhere():
    check({})
    assert {implementation(name, {}).value for name in flags.OPERATORS} == {"auto"}
    assert {setting(flag.name, {}).source for flag in flags.FLAGS} == {"default"}


def test_every_operator_of_the_table_exists_and_the_other_way_round():
    from dsv4_plugin.ops.operator import OPERATORS

    assert set(flags.OPERATORS) == set(OPERATORS)
    offered = {name for operator in OPERATORS.values() for name in operator.implementations}
    assert offered <= set(flags.IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("environ", "named", "way_out"),
    [
        (
            {"DSV4_SPARSE_MLE": "triton"},
            "DSV4_SPARSE_MLE='triton'",
            "did you mean DSV4_SPARSE_MLA?",
        ),
        ({"DSV4_PROFLIE": "safe"}, "DSV4_PROFLIE='safe'", "did you mean DSV4_PROFILE?"),
        ({"DSV4_MOE": "cutlass"}, "DSV4_MOE='cutlass'", "takes auto or reference"),
        ({"DSV4_SPARSE_MLA": "flydsl"}, "DSV4_SPARSE_MLA='flydsl'", "tilelang"),
        ({"DSV4_PROFILE": "2026-05-03"}, "DSV4_PROFILE='2026-05-03'", "2026-05-04"),
        ({"DSV4_LAYERS_MOE": "0-"}, "DSV4_LAYERS_MOE='0-'", "as 0-3,7"),
        ({"DSV4_LAYERS_MOE": "7-3"}, "7-3", "backwards"),
        (
            {"SGLANG_HACK_FLASHMLA_BACKEND": "cuda"},
            "SGLANG_HACK_FLASHMLA_BACKEND='cuda'",
            "tilelang",
        ),
        (
            {"SGLANG_OPT_USE_TILELANG_INDEXER": "maybe"},
            "SGLANG_OPT_USE_TILELANG_INDEXER='maybe'",
            "0 or 1",
        ),
        ({"SGLANG_HACK_FLASHMLA_BACKEND": "unified_kv_triton"}, "unified_kv_triton", "unset it"),
        (
            {"DSV4_SPARSE_MLA": "triton", "SGLANG_HACK_FLASHMLA_BACKEND": "torch"},
            "DSV4_SPARSE_MLA=triton and SGLANG_HACK_FLASHMLA_BACKEND=torch contradict",
            "unset one",
        ),
        (
            {"SGLANG_OPT_USE_FUSED_COMPRESS": "1", "DSV4_COMPRESS": "reference"},
            "SGLANG_OPT_USE_FUSED_COMPRESS=1",
            "unset one",
        ),
        ({"DSV4_ADOPTED": "yes"}, "DSV4_ADOPTED='yes'", "unset it"),
        (
            {"DSV4_PROFILE": "safe", "DSV4_LAYERS_MOE": "0-3"},
            "DSV4_LAYERS_MOE=0-3",
            "DSV4_PROFILE=safe",
        ),
    ],
)
def test_what_is_wrong_is_named_with_the_way_out(environ, named, way_out):
    with pytest.raises(FlagError) as error:
        check(environ)
    assert named in str(error.value) and way_out in str(error.value)


@pytest.mark.parametrize("operator", flags.OPERATORS)
def test_a_flag_takes_what_its_operator_has_and_nothing_else(operator):
    from dsv4_plugin.ops.operator import OPERATORS

    name, has = flags.operator_flag(operator), OPERATORS[operator].implementations
    for value in flags.IMPLEMENTATIONS:
        if value in ("auto", "reference") or value in has:
            assert implementation(operator, {name: value}).value == value
        else:
            with pytest.raises(FlagError, match=f"{name}='{value}' is not a value of this flag"):
                check({name: value})


def test_without_the_operators_any_name_of_an_implementation_is_taken(monkeypatch):
    monkeypatch.setattr(flags, "registered", None)
    check({"DSV4_MOE": "aiter"})
    with pytest.raises(FlagError, match="DSV4_MOE='cutlass'.*flydsl"):
        check({"DSV4_MOE": "cutlass"})


def test_own_variable_then_foreign_then_profile_then_default():
    environ = {"DSV4_PROFILE": "safe"}
    assert implementation("sparse_mla", environ) == flags.Setting(
        "reference", "DSV4_PROFILE=safe", yields=True
    )
    environ["SGLANG_HACK_FLASHMLA_BACKEND"] = "triton"
    assert implementation("sparse_mla", environ) == flags.Setting(
        "triton", "SGLANG_HACK_FLASHMLA_BACKEND=triton"
    )
    del environ["SGLANG_HACK_FLASHMLA_BACKEND"]
    environ["DSV4_SPARSE_MLA"] = "gluon"
    assert implementation("sparse_mla", environ) == flags.Setting("gluon", "DSV4_SPARSE_MLA=gluon")
    check(environ)


@pytest.fixture
def with_every_implementation(monkeypatch):
    """As if every operator had every implementation that a foreign variable may ask for."""
    monkeypatch.setattr(flags, "registered", None)


def test_safe_is_all_references():
    environ = {"DSV4_PROFILE": "safe"}
    assert {implementation(name, environ).value for name in flags.OPERATORS} == {"reference"}


@pytest.mark.parametrize("date", DATES)
def test_milestones_name_known_implementations_of_every_operator(date):
    chosen = flags.profiles()[date]["operators"]
    assert set(chosen) == set(flags.OPERATORS)
    for operator, wanted in chosen.items():
        assert flags._BY_NAME[flags.operator_flag(operator)].takes(wanted), operator
    check({"DSV4_PROFILE": date})


def test_each_milestone_leaves_fewer_references():
    references = [
        list(flags.profiles()[date]["operators"].values()).count("reference") for date in DATES
    ]
    assert references == sorted(references, reverse=True) and len(set(references)) == len(DATES)


# The variables of each InferenceX recipe that concern operators (as published with the curves), and
# the operators whose implementation follows from them: the same as the milestone of that date,
# reached through the foreign names.
RECIPES = {
    "2026-05-02": {
        "SGLANG_HACK_FLASHMLA_BACKEND": "tilelang",
        "SGLANG_OPT_USE_TILELANG_INDEXER": "true",
        "SGLANG_FORCE_TRITON_MOE_FP8": "0",
        "SGLANG_OPT_USE_FUSED_COMPRESS": "false",
        "SGLANG_OPT_USE_TILELANG_MHC_PRE": "false",
        "SGLANG_OPT_USE_TILELANG_MHC_POST": "false",
        "SGLANG_TOPK_TRANSFORM_512_TORCH": "1",
        "SGLANG_OPT_USE_FUSED_STORE_CACHE": "false",
        "SGLANG_OPT_USE_FUSED_HASH_TOPK": "false",
    },
    "2026-05-10": {
        "SGLANG_HACK_FLASHMLA_BACKEND": "tilelang",
        "SGLANG_OPT_USE_TILELANG_INDEXER": "true",
        "SGLANG_FORCE_TRITON_MOE_FP8": "0",
        "SGLANG_OPT_USE_FUSED_COMPRESS": "true",
        "SGLANG_OPT_USE_AITER_MHC_PRE": "true",
        "SGLANG_OPT_USE_AITER_MHC_POST": "true",
        "SGLANG_OPT_USE_TILELANG_MHC_PRE": "false",
        "SGLANG_OPT_USE_TILELANG_MHC_POST": "false",
        "SGLANG_OPT_USE_TRITON_SWA_PREPARE": "true",
        "SGLANG_OPT_USE_FUSED_STORE_CACHE": "false",
        "SGLANG_OPT_USE_FUSED_HASH_TOPK": "false",
    },
    "2026-05-21": {
        "SGLANG_HACK_FLASHMLA_BACKEND": "triton",
        "SGLANG_OPT_USE_TILELANG_INDEXER": "true",
        "SGLANG_FORCE_TRITON_MOE_FP8": "0",
        "AITER_BF16_FP8_MOE_BOUND": "1",
        "SGLANG_OPT_USE_FUSED_PAGED_COMPRESS": "true",
        "SGLANG_OPT_USE_FUSED_COMPRESS": "false",
        "SGLANG_OPT_USE_AITER_MHC_PRE": "true",
        "SGLANG_OPT_USE_AITER_MHC_POST": "true",
        "SGLANG_OPT_USE_TRITON_SWA_PREPARE": "true",
        "SGLANG_OPT_USE_FUSED_STORE_CACHE": "true",
        "SGLANG_OPT_USE_FUSED_HASH_TOPK": "true",
    },
}


@pytest.mark.parametrize("date", RECIPES)
def test_a_recipe_asks_for_what_its_milestone_names(date):
    check(RECIPES[date])
    asked = {choice.operator for choice in flags.foreign_choices(RECIPES[date])}
    assert len(asked) >= 7
    for operator in asked:
        assert (
            implementation(operator, RECIPES[date]).value
            == flags.profiles()[date]["operators"][operator]
        ), operator


def test_what_a_variable_of_others_asks_for_in_vain_is_said():
    environ = {"SGLANG_OPT_USE_AITER_INDEXER": "1", "DSV4_INDEXER_LOGITS": "triton"}
    check(environ)
    assert implementation("indexer_logits", environ).value == "triton"
    assert flags.notes(environ) == [
        "SGLANG_OPT_USE_AITER_INDEXER=1 has no effect: indexer_logits has no implementation aiter"
    ]


def test_a_variable_that_is_off_asks_for_nothing_once_another_is_on(with_every_implementation):
    environ = {"SGLANG_OPT_USE_AITER_MHC_PRE": "0"}
    assert implementation("mhc_pre", environ).value == "reference"
    environ["SGLANG_OPT_USE_TILELANG_MHC_PRE"] = "1"
    assert implementation("mhc_pre", environ).value == "tilelang"


def test_layers():
    assert layers("moe", {"DSV4_LAYERS_MOE": "0-3,7"}) == {0, 1, 2, 3, 7}
    assert layers("moe", {}) is None


def test_foreign_variables_are_logged_once_and_kept_from_the_host(
    caplog, with_every_implementation
):
    environ = {"SGLANG_OPT_USE_AITER_INDEXER": "1", "SGLANG_ENABLE_THINKING": "1"}
    with caplog.at_level(logging.WARNING):
        flags.adopt(environ)
        flags.adopt(environ)
    assert [record.getMessage() for record in caplog.records] == [
        "dsv4_plugin: SGLANG_OPT_USE_AITER_INDEXER=1 is taken as DSV4_INDEXER_LOGITS=aiter",
        (
            "dsv4_plugin: SGLANG_ENABLE_THINKING=1 has no effect: SGLang renamed it; set"
            " SGLANG_DEFAULT_THINKING"
        ),
    ]
    # SGLang sets this one itself on ROCm while it resolves its arguments; a worker must not take it
    # for the user's.
    environ["SGLANG_FP8_PAGED_MQA_LOGITS_TORCH"] = "True"
    assert implementation("indexer_logits", environ).value == "aiter"
    check(environ)


def test_no_foreign_variable_lacks_a_meaning():
    for name, row in flags.foreign_flags().items():
        assert set(row) <= {"values", "enabled", "disabled", "refuse", "note"} and row, name
        sides = [*row.get("values", {}).values(), row.get("enabled", {}), row.get("disabled", {})]
        for side in sides:
            assert isinstance(side, str) or set(side) <= set(flags.OPERATORS), name
            assert isinstance(side, str) or set(side.values()) <= set(flags.IMPLEMENTATIONS), name
        assert all(isinstance(value, str) for value in row.get("values", {})), (
            f"{name}: quote YAML's booleans"
        )


def test_the_document_is_the_table():
    assert (ROOT / "docs/flags.md").read_text() == markdown(), (
        "run: dsv4 flags --markdown > docs/flags.md"
    )


def test_command_prints_values_and_sources(monkeypatch, capsys):
    from dsv4_plugin.cli import main
    from dsv4_plugin.ops.operator import OPERATORS

    monkeypatch.setenv("DSV4_PROFILE", "safe")
    monkeypatch.setenv("SGLANG_OPT_DPSK_V4_RADIX", "1")
    assert main(["flags", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in printed["flags"]}
    assert (rows["DSV4_MOE"]["value"], rows["DSV4_MOE"]["source"]) == (
        "reference",
        "DSV4_PROFILE=safe",
    )
    assert rows["DSV4_SPARSE_MLA"]["values"] == [
        "auto",
        "reference",
        *OPERATORS["sparse_mla"].implementations,
    ]
    assert len(rows) == len(flags.FLAGS) and "prefix cache" in printed["notes"][0]
    monkeypatch.setenv("DSV4_SPARSE_MLA", "cutlass")
    assert main(["flags"]) == 2
    assert "takes auto or reference or gluon or triton" in capsys.readouterr().err
    monkeypatch.delenv("DSV4_SPARSE_MLA")
    monkeypatch.setenv("DSV4_PROFIL", "safe")
    assert main(["flags"]) == 2
    assert "did you mean DSV4_PROFILE?" in capsys.readouterr().err
