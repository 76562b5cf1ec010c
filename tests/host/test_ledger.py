"""The ledger of seams: every record is complete, holds after loading, and one that does not hold is
found."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from live_server import launch

ROOT = Path(__file__).parents[2]
PLUGIN = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

def register():
    HookRegistry.register(
        "sglang.srt.mem_cache.kv_cache_configurator.reject_out_of_tree_path",
        lambda *a, **k: None, HookType.REPLACE)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | environment,
    )


SHOW_CLASSES = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.platforms import current_platform
import sys
print(ModelRegistry.models["DeepseekV4ForCausalLM"].__module__,
      ATTENTION_BACKENDS["dsv4"].__module__,
      type(current_platform).__module__, "dsv4_plugin.model" in sys.modules)
"""


def test_loading_the_plugins_takes_the_seams():
    result = python(SHOW_CLASSES, DSV4_DEVICE="cpu", DSV4_STRICT="1")
    assert result.stdout.split()[-4:] == [
        "dsv4_plugin.host.model",
        "dsv4_plugin.host.backend",
        "dsv4_plugin.host.platform",
        "True",
    ], result.stderr[-2000:]


def test_dsv4_plugin_0_is_the_stock_host():
    result = python(SHOW_CLASSES, DSV4_PLUGIN="0", DSV4_DEVICE="cpu", DSV4_NO_SUCH_FLAG="1")
    model, backend, platform, loaded = result.stdout.split()[-4:]
    assert (
        model.startswith("sglang.")
        and backend.startswith("sglang.")
        and platform.startswith("sglang.")
    )
    assert loaded == "False"


@pytest.fixture(scope="module")
def ledger():
    """The ledger with its seams taken in this process."""
    from dsv4_plugin.host import ledger, seams

    ledger.take(seams.seams())
    return ledger


def test_every_record_is_complete(ledger):
    from dsv4_plugin.host.control import CONTROL_SEAMS
    from dsv4_plugin.host.draft_slots import SLOT_SEAMS
    from dsv4_plugin.host.dspark_worker import ACCEPT_SEAMS
    from dsv4_plugin.host.host_memory import CPU_MEMORY_SEAMS
    from dsv4_plugin.host.http_errors import HTTP_SEAMS
    from dsv4_plugin.host.lost_worker import LOST_WORKER
    from dsv4_plugin.host.mtp_worker import CHAIN_SEAMS
    from dsv4_plugin.host.requests import REQUEST_SEAMS
    from dsv4_plugin.host.sampler import SAMPLER
    from dsv4_plugin.host.seams import CPU_DSPARK, CPU_PINNED, CPU_POOL, SEAMS

    cpu = (
        CPU_POOL,
        CPU_PINNED,
        CPU_DSPARK,
        *SLOT_SEAMS,
        *ACCEPT_SEAMS,
        *CHAIN_SEAMS,
        *CPU_MEMORY_SEAMS,
    )
    entry = (*REQUEST_SEAMS, *CONTROL_SEAMS, LOST_WORKER, *HTTP_SEAMS)
    for seam in (*SEAMS, *cpu, *entry, SAMPLER):
        assert seam.why and seam.remove and seam.versions
        assert seam.target.startswith("sglang.")
        assert (ROOT / seam.test).is_file(), seam.target
    assert all(seam.holds() for seam in ledger.taken())


def test_a_lost_seam_is_logged_or_stops_the_start(ledger, monkeypatch, caplog):
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    monkeypatch.setitem(ATTENTION_BACKENDS, "dsv4", lambda runner: None)
    with caplog.at_level(logging.ERROR):
        ledger.verify("in this test")
    assert "in this test" in caplog.text and "ATTENTION_BACKENDS['dsv4']" in caplog.text
    monkeypatch.setenv("DSV4_STRICT", "1")
    with pytest.raises(ledger.LedgerError, match="1 of its seams do not hold.*ATTENTION_BACKENDS"):
        ledger.verify("in this test")


@pytest.mark.thorough
def test_a_seam_that_another_plugin_took_stops_a_strict_server(golden_dir, tmp_path):
    """The other plugin uses the host's hooks, which apply after every plugin has loaded, ours
    included."""
    (tmp_path / "other_plugin.py").write_text(PLUGIN)
    record = tmp_path / "other_plugin-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: other_plugin\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nother = other_plugin:register\n"
    )
    result = launch("--model-path", str(golden_dir), DSV4_STRICT="1", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "dsv4: error: " in result.stderr and "reject_out_of_tree_path" in result.stderr
    assert "Load weight begin" not in result.stderr
