"""Where a build puts kernels is where SGLang has its compilers look."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dsv4_plugin import device
from dsv4_plugin.runtime import kernel_cache, languages

REGISTER = """
import os, sglang
from dsv4_plugin.host.plugin import register
register()
print(os.environ["TILELANG_CACHE_DIR"])
"""


@pytest.mark.parametrize("given", [None, "/somewhere/else"])
def test_the_root_is_the_hosts(given, monkeypatch):
    from sglang.srt.environ import third_party_cache_defaults

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("SGLANG_CACHE_DIR", raising=False)
    if given:
        monkeypatch.setenv("SGLANG_CACHE_DIR", given)
    defaults = third_party_cache_defaults()
    assert str(kernel_cache.root()) == defaults["TRITON_CACHE_DIR"]
    assert str(device.host_caches() / "tilelang") == defaults["TILELANG_CACHE_DIR"]
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert str(kernel_cache.root()) == "/mine"


@pytest.mark.skipif(languages.version("tilelang") is None, reason="TileLang is not installed")
@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"DSV4_MHC_POST": "tilelang"}, "/kernels/triton/tilelang"),
        pytest.param(
            {"DSV4_MHC_POST": "tilelang", "TILELANG_CACHE_DIR": "/mine"},
            "/mine",
            marks=pytest.mark.thorough,
        ),
        pytest.param({}, "/kernels/tilelang", marks=pytest.mark.thorough),
    ],
    ids=["named", "set by the user", "not named"],
)
def test_the_stock_command_finds_what_was_built(environment, place):
    """`python -m sglang.launch_server` registers the plugin and runs nothing else of ours first."""
    cleared = {name: value for name, value in os.environ.items() if "CACHE_DIR" not in name}
    ran = subprocess.run(
        [sys.executable, "-c", REGISTER],
        capture_output=True,
        text=True,
        env=cleared | {"SGLANG_CACHE_DIR": "/kernels"} | environment,
    )
    assert ran.stdout.splitlines()[-1:] == [place], ran.stderr
