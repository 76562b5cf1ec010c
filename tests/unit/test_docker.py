"""The container files, as far as they can be checked where no container runs: hadolint's rules, and
names that the package really has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsv4_plugin.cli import main

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def test_hadolint_has_nothing_to_say():
    ran = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DOCKER / "Dockerfile.rocm"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout


def test_the_image_builds_what_the_command_knows(tmp_path, capsys):
    text = (DOCKER / "Dockerfile.rocm").read_text()
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.M))
    (command,) = re.findall(r"^RUN dsv4 (build .*)$", text, re.M)
    words = re.sub(r'"\$\{(\w+)\}"', lambda found: defaults[found[1]], command).split()
    # a layout that does not fit ends before anything is compiled
    assert main([*words[:3], "7", *words[4:], "--out", str(tmp_path)]) == 2
    assert "7 does not divide" in capsys.readouterr().err


def test_the_server_of_the_compose_file_takes_its_words():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    server = compose["services"]["server"]
    assert (DOCKER / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (DOCKER / volume.split(":")[0]).exists(), volume
        assert ":latest" not in service.get("image", ""), "a version is pinned"
    from dsv4_plugin.host.arguments import argument_problems

    words = ["--model-path", *server["command"]]
    words = [{"--tp": "--tp-size"}.get(word, word) for word in words]
    assert argument_problems(words) == []


@pytest.fixture(scope="module")
def asked() -> set[str]:
    """The series that the dashboard asks Prometheus for."""
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "dsv4.json").read_text())
    text = " ".join(t["expr"] for panel in dashboard["panels"] for t in panel["targets"])
    return set(re.findall(r"\b(?:dsv4_|sglang:)\w+", text))


def test_the_dashboard_shows_every_series_of_ours(asked):
    source = (ROOT / "dsv4_plugin" / "host" / "metrics.py").read_text()
    gauges = set(re.findall(r'Gauge\(\s*"(\w+)"', source))
    counters = {f"{name}_total" for name in re.findall(r'Counter\(\s*"(\w+)"', source)}
    assert {name for name in asked if name.startswith("dsv4_")} == gauges | counters


def test_the_hosts_series_are_the_hosts(asked):
    import sglang

    source = "".join(
        path.read_text(errors="ignore")
        for path in (Path(sglang.__file__).parent / "srt").rglob("*metrics*.py")
    )
    for name in asked:
        if name.startswith("sglang:"):
            assert f'"{name.removesuffix("_bucket")}"' in source, name
