"""`dsv4 doctor`: it finds what is wrong with a machine, says what to do, and its exit status
tells."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from live_server import DSV4

from dsv4_plugin.host import doctor
from dsv4_plugin.host.doctor import OK, WARNING, WRONG


def by_name(checks):
    return {check.name: check for check in checks}


def run_doctor(*arguments, **environment):
    return subprocess.run(
        [DSV4, "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


def test_a_healthy_machine():
    ran = run_doctor("--json", DSV4_DEVICE="cpu", DSV4_STRICT="1")
    checks = json.loads(ran.stdout)
    assert ran.returncode == 0, [check for check in checks if check["status"] == "wrong"]
    names = [check["name"] for check in checks]
    assert {
        "python",
        "torch",
        "device",
        "triton",
        "sglang",
        "switches",
        "operators",
        "cache of sglang",
        "first start",
        "patch pool-platform-seam",
        "plugin",
        "seam",
        "choices",
    } <= set(names)
    seams = [check["found"] for check in checks if check["name"] == "seam"]
    assert any("reject_out_of_tree_path" in seam for seam in seams) and len(seams) >= 4


@pytest.mark.thorough
def test_another_plugin_that_holds_the_model_is_named(tmp_path):
    """A real plugin, found by its entry point like ours, that keeps the model for itself."""
    (tmp_path / "thief.py").write_text(
        "class Model: pass\nclass Kept(dict):\n    def update(self, other): super().update({k: v"
        " for k, v in other.items() if k != 'DeepseekV4ForCausalLM'})\ndef register():\n    from"
        " sglang.srt.models.registry import ModelRegistry\n    ModelRegistry.models ="
        " Kept(ModelRegistry.models, DeepseekV4ForCausalLM=Model)\n"
    )
    info = tmp_path / "thief-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thief\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nthief = thief:register\n")
    ran = run_doctor(PYTHONPATH=str(tmp_path), COLUMNS="300")
    assert ran.returncode == 1
    assert "holds thief.Model" in ran.stdout and "SGLANG_PLUGINS=dsv4" in ran.stdout
    assert "1 of" in ran.stdout and "beside" in ran.stdout and "thief" in ran.stdout


def test_a_host_of_another_version_is_not_touched(tmp_path):
    """Metadata of another release, found first; SGLang is not imported, its seams are not looked
    at."""
    info = tmp_path / "sglang-0.5.18.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.18\n")
    ran = run_doctor("--json", PYTHONPATH=str(tmp_path))
    checks = {check["name"]: check for check in json.loads(ran.stdout)}
    assert ran.returncode == 1 and "seam" not in checks
    assert checks["sglang"]["status"] == "wrong" and "0.5.18" in checks["sglang"]["found"]
    assert "Install sglang==0.5.23" in checks["sglang"]["advice"]


def test_the_plugin_switched_off_is_a_warning_and_nothing_is_loaded(monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "0")
    checks = by_name(doctor.examine())
    assert checks["plugin"].status == WARNING and "stock SGLang" in checks["plugin"].found
    assert "seam" not in checks and not [
        check for check in checks.values() if check.status == WRONG
    ]


@pytest.mark.parametrize(
    ("environ", "name", "found", "advice"),
    [
        ({"DSV4_MOEE": "triton"}, "switches", "did you mean DSV4_MOE?", "dsv4 flags"),
        (
            {"DSV4_SPARSE_MLA": "triton"},
            "operators",
            "DSV4_SPARSE_MLA=triton cannot run here",
            "or auto",
        ),
        (
            {"DSV4_SPARSE_MLA": "triton", "SGLANG_HACK_FLASHMLA_BACKEND": "torch"},
            "switches",
            "contradict",
            "unset",
        ),
        (
            {"SGLANG_CACHE_DIR": "/dev/null/cache"},
            "cache of sglang",
            "/dev/null/cache cannot be written",
            "compiles again",
        ),
    ],
)
def test_what_is_wrong_is_named_with_advice(monkeypatch, environ, name, found, advice):
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    checks = by_name([*doctor._switches(), *doctor._caches()])
    assert checks[name].status == WRONG
    assert found in checks[name].found and advice in checks[name].advice


def test_variables_of_others_are_explained(monkeypatch):
    monkeypatch.setenv("SGLANG_ENABLE_THINKING", "1")
    [check] = [check for check in doctor._switches() if check.status == WARNING]
    assert "SGLANG_DEFAULT_THINKING" in check.found


def test_an_allow_list_without_us_is_wrong(monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert (
        doctor._entry_point().status == WRONG and "leaves out dsv4" in doctor._entry_point().found
    )
    monkeypatch.setenv("SGLANG_PLUGINS", "other, dsv4")
    assert doctor._entry_point().status == OK


def test_a_torch_that_does_not_fit_an_amd_machine_is_wrong(monkeypatch):
    exists = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda self: True if str(self) == "/dev/kfd" else exists(self)
    )
    checks = by_name(doctor._torch())
    assert checks["torch"].status == WRONG and "--no-deps" in checks["torch"].advice
    assert checks["device"].status == WRONG


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        (
            "sm_80",
            {
                "sm_80 has no FP8 e4m3": (WARNING, "indexer_logits (reference, not triton)"),
                "sm_80 is not one of gfx950": (OK, "sparse_mla (triton, not gluon)"),
            },
        ),
        ("sm_90", {"sm_90 is not one of gfx950": (OK, "sparse_mla (triton, not gluon)")}),
    ],
)
def test_what_this_gpu_lacks_is_said_with_what_runs_instead(monkeypatch, arch, said):
    monkeypatch.setattr(doctor.device, "arch", lambda: arch)
    checks = [check for check in doctor._implementations()]
    for start, (status, words) in said.items():
        [check] = [check for check in checks if check.found.startswith(start)]
        assert check.status == status and words in check.found
        assert bool(check.advice) == (status == WARNING)


def test_on_a_cpu_no_implementation_is_missed():
    assert list(doctor._implementations()) == []
