"""DSV4_PLUGIN=0 is stock SGLang: a process with the plugin installed and off holds what one without
it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_STATE = """
import importlib.metadata, json, os, re, sys
if "hidden" in sys.argv:  # as if dsv4_plugin were not installed
    everything = importlib.metadata.entry_points
    def others(**query):
        found = everything(**query)
        if not query:
            return found
        return importlib.metadata.EntryPoints(
            entry for entry in found if not entry.value.startswith("dsv4_plugin"))
    importlib.metadata.entry_points = others
    sys.modules["dsv4_plugin"] = None
before = dict(os.environ)
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.platforms import current_platform
from sglang.srt.arg_groups import choices, model_override_base, resolution_hooks
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.models.registry import ModelRegistry
load_plugins()
if "hidden" in sys.argv:
    del sys.modules["dsv4_plugin"]
def origin(value):
    module = getattr(value, "__module__", type(value).__module__)
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"
def several(value):
    return isinstance(value, (list, tuple, set))
def shown(table):
    return {str(key): [origin(v) for v in value] if several(value) else origin(value)
            for key, value in dict(table).items()}
ours = sorted(f"{name}.{attribute}" for name, module in list(sys.modules.items())
              if name.startswith("sglang")
              for attribute, value in list(vars(module).items())
              if str(getattr(value, "__module__", "")).startswith("dsv4_plugin"))
print(json.dumps({
    "models": shown(ModelRegistry.models), "backends": shown(ATTENTION_BACKENDS),
    "quantization": shown(QUANTIZATION_METHODS),
    "overrides": shown(model_override_base._MODEL_OVERRIDE_FNS),
    "resolution": shown(resolution_hooks._HOOKS), "platform": origin(type(current_platform)),
    "choices": {name: value for name, value in vars(choices).items()
                if name.endswith("CHOICES") and isinstance(value, list)},
    "hooks": {name: re.sub(" at 0x[0-9a-f]+", "", str(value))
              for name, value in vars(HookRegistry).items()
              if isinstance(value, (dict, list, set))},
    "gate": origin(kv_cache_configurator.reject_out_of_tree_path),
    "host attributes that are ours": ours,
    "environment": {name: value for name, value in os.environ.items() if before.get(name) != value},
    "modules": sorted(name for name in sys.modules if not name.startswith("dsv4_plugin")),
    "our modules": sorted(name for name in sys.modules if name.startswith("dsv4_plugin"))}))
"""


def state(*arguments, **environment):
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DSV4_", "SGLANG_", "TRITON_"))
    }
    ran = subprocess.run(
        [sys.executable, "-c", _STATE, *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without():
    return state("hidden")


def test_the_comparison_sees_the_plugin_when_it_is_on(without):
    on = state(DSV4_DEVICE="cpu")
    different = {name for name in without if without[name] != on[name]}
    assert {
        "models",
        "backends",
        "overrides",
        "platform",
        "gate",
        "host attributes that are ours",
        "our modules",
    } <= different


@pytest.mark.parametrize(
    "others",
    [
        {},
        pytest.param(
            {
                "DSV4_DEVICE": "cpu",
                "DSV4_PROFILE": "safe",
                "DSV4_NO_SUCH_FLAG": "1",
                "DSV4_STRICT": "1",
            },
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["alone", "whatever else is set"],
)
def test_off_is_stock(without, others):
    off = state(DSV4_PLUGIN="0", **others)
    assert without["our modules"] == []
    for name in without:
        if name not in ("our modules", "modules"):
            assert off[name] == without[name], name
    assert off["host attributes that are ours"] == []
    # The entry points have to be read to know that they are off: they load nothing of SGLang that
    # was not loaded anyway.
    assert [
        name
        for name in set(off["modules"]) ^ set(without["modules"])
        if name.startswith(("sglang", "torch", "triton"))
    ] == []
    assert not [
        name
        for name in off["our modules"]
        if name.split(".")[1:2] in (["ops"], ["model"], ["kernels"], ["runtime"])
    ]
