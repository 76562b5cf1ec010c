"""The table of switches and what reads it."""

from __future__ import annotations

import pytest

from dsv4_plugin import flags
from dsv4_plugin.config import Precision


def test_defaults_are_values_of_their_flags():
    for flag in flags.FLAGS:
        assert flag.takes(flag.default), flag.name
        assert flag.meaning.endswith(".")
    assert len({flag.name for flag in flags.FLAGS}) == len(flags.FLAGS)


def test_unset_flags_have_their_defaults():
    assert flags.precision({}) is Precision.SERVING
    assert flags.enabled("DSV4_PLUGIN", {}) and not flags.enabled("DSV4_STRICT", {})
    flags.check({"HOME": "/root", "SGLANG_DSV4_KV_LAYOUT": "v4"})


def test_a_set_flag_is_read():
    assert flags.precision({"DSV4_PRECISION": "official"}) is Precision.OFFICIAL
    assert not flags.enabled("DSV4_PLUGIN", {"DSV4_PLUGIN": "0"})


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("DSV4_PRECISON", "DSV4_PRECISION"),
        ("DSV4_PLUGINS", "DSV4_PLUGIN"),
        ("DSV4_MOE_BACKEND", "DSV4_MOE"),
    ],
)
def test_an_unknown_flag_is_an_error_with_the_nearest_name(name, nearest):
    with pytest.raises(flags.FlagError, match=f"{name}='1'.*{nearest}"):
        flags.check({name: "1"})


def test_a_wrong_value_is_an_error_that_lists_the_right_ones():
    with pytest.raises(
        flags.FlagError, match="DSV4_PRECISION='fp32'.*exact or official or serving"
    ):
        flags.check({"DSV4_PRECISION": "fp32"})
    with pytest.raises(flags.FlagError, match="DSV4_PLUGIN='yes'"):
        flags.enabled("DSV4_PLUGIN", {"DSV4_PLUGIN": "yes"})


def test_layers_of_an_operator():
    assert flags.layers("moe", {}) is None
    assert flags.layers("moe", {"DSV4_LAYERS_MOE": "0-2,7"}) == {0, 1, 2, 7}
    with pytest.raises(flags.FlagError, match="DSV4_LAYERS_MOE"):
        flags.layers("moe", {"DSV4_LAYERS_MOE": "first"})
