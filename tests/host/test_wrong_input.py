"""Wrong input as a user meets it: one clear line and a non-zero exit, before any weight is read or
worker started."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from live_server import DSV4, READY_SECONDS, free_port, launch
from safetensors.torch import load_file, save_file

from dsv4_plugin import cli, device


@pytest.fixture
def checkpoint(golden_dir, tmp_path) -> Path:
    """A private copy of the golden checkpoint, to be spoiled."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden_dir / name, directory / name)
    return directory


def edit_config(checkpoint: Path, **changes) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(checkpoint: Path, change) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def no_norm(checkpoint):
    edit_weights(checkpoint, lambda tensors: tensors.pop("norm.weight"))
    return [], "norm.weight"


def extra_tensor(checkpoint):
    edit_weights(
        checkpoint, lambda tensors: tensors.update({"layers.9.attn.wq_a.weight": torch.zeros(2)})
    )
    return [], "layers.9.attn.wq_a.weight"


def wrong_shape(checkpoint):
    edit_weights(
        checkpoint,
        lambda tensors: tensors.update({"norm.weight": torch.zeros(64, dtype=torch.bfloat16)}),
    )
    return [], "norm.weight"


def wrong_dtype(checkpoint):
    edit_weights(
        checkpoint, lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].half()})
    )
    return [], "norm.weight"


def truncated(checkpoint):
    path = checkpoint / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    return [], "model.safetensors"


def index_names_absent_file(checkpoint):
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"norm.weight": "model-00001-of-00002.safetensors"}})
    )
    return [], "model-00001-of-00002.safetensors"


def other_architecture(checkpoint):
    edit_config(checkpoint, architectures=["LlamaForCausalLM"])
    return [], "LlamaForCausalLM"


def later_family(checkpoint):
    edit_config(checkpoint, kv_source_layer_ids=[0])
    return [], "kv_source_layer_ids"


def unknown_ratio(checkpoint):
    edit_config(checkpoint, compress_ratios=[0, 0, 4, 64, 4, 0])
    return [], "[64]"


def no_config(checkpoint):
    (checkpoint / "config.json").unlink()
    return [], "config.json"


def tp_divides_no_heads(checkpoint):
    return ["--tp", "3"], "num_attention_heads"


def tp_divides_no_groups(checkpoint):
    return ["--tp", "4"], "o_groups"


def ep_divides_no_tp(checkpoint):
    return ["--tp", "2", "--ep", "4"], "--ep-size 4"


def no_process(checkpoint):
    return ["--tp", "0"], "--tp-size 0"


def too_high_a_port(checkpoint):
    return ["--port", "99999"], "99999 is no port"


def any_port(checkpoint):
    return ["--port", "0"], "0 is no port"


def chunks_that_are_no_pages(checkpoint):
    return ["--chunked-prefill-size", "300"], "--chunked-prefill-size 300"


def windows_without_a_pool(checkpoint):
    return ["--disable-hybrid-swa-memory"], "--disable-hybrid-swa-memory"


SPOILED = [
    no_norm,
    extra_tensor,
    wrong_shape,
    wrong_dtype,
    truncated,
    index_names_absent_file,
    other_architecture,
    later_family,
    unknown_ratio,
    no_config,
    tp_divides_no_heads,
    tp_divides_no_groups,
    ep_divides_no_tp,
    no_process,
    too_high_a_port,
    any_port,
    chunks_that_are_no_pages,
    windows_without_a_pool,
]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_dsv4_serve_refuses(spoil, checkpoint, capsys):
    arguments, named = spoil(checkpoint)
    status = cli.main(["serve", str(checkpoint), "--cpu", *arguments])
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("dsv4: error: ") and error.count("\n") == 1 and named in error


def test_dsv4_serve_says_how_to_serve_without_a_gpu(golden_dir, capsys, monkeypatch):
    monkeypatch.setattr(device, "arch", lambda: device.CPU)
    assert cli.main(["serve", str(golden_dir)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no GPU" in error and "--cpu" in error


def test_dsv4_serve_refuses_a_name_that_is_nowhere(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["serve", "nosuch/model", "--cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no directory nosuch/model here" in error


def test_dsv4_serve_refuses_a_switch_that_cannot_run(golden_dir, capsys, monkeypatch):
    for name in ("DSV4_DEVICE", "DSV4_STRICT", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # set by the command, and taken back after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("DSV4_SPARSE_MLA", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(device, "arch", lambda: device.CPU)
    assert cli.main(["serve", str(golden_dir), "--cpu"]) == 2
    assert "DSV4_SPARSE_MLA=triton cannot run here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--nosuch"], "unrecognized arguments: --nosuch"),
        (["--chat-template", "nosuch"], "--chat-template nosuch is neither a template"),
        *(
            pytest.param(*each, marks=pytest.mark.thorough)
            for each in (
                (["--preferred-sampling-params", '{"nosuch": 1}'], "--preferred-sampling-params"),
                (["--completion-template", "/dev/null"], "nor a file that ends in .json"),
                (["--retraction-policy", "priority"], "requires --enable-priority-scheduling"),
            )
        ),
    ],
)
def test_what_the_host_refuses_is_one_line(golden_dir, words, named):
    command = [str(DSV4), "serve", str(golden_dir), "--cpu", "--port", str(free_port()), *words]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=READY_SECONDS)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line.startswith("dsv4: error: ")]
    assert len(lines) == 1 and named in lines[0]


def test_dsv4_serve_refuses_a_port_in_use(golden_dir, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(golden_dir), "--cpu", "--port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err


def test_dsv4_serve_refuses_to_serve_without_the_plugin(golden_dir, capsys, monkeypatch):
    monkeypatch.setenv("DSV4_PLUGIN", "0")
    assert cli.main(["serve", str(golden_dir), "--cpu"]) == 2
    assert "DSV4_PLUGIN=0" in capsys.readouterr().err


def refusal(result: subprocess.CompletedProcess) -> str:
    """The one line of ours; nothing was started and no traceback printed."""
    assert result.returncode == 2, result.stderr[-3000:]
    assert "Traceback" not in result.stderr and "Load weight begin" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("dsv4: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("spoil", [no_norm, unknown_ratio], ids=lambda spoil: spoil.__name__)
def test_launch_server_refuses(spoil, checkpoint):
    arguments, named = spoil(checkpoint)
    assert named in refusal(launch("--model-path", str(checkpoint), *arguments))


def test_launch_server_refuses_what_the_model_does_not_do(golden_dir):
    assert "--enable-lora" in refusal(
        launch(
            "--model-path",
            str(golden_dir),
            "--enable-lora",
            "--max-lora-rank",
            "8",
            "--lora-target-modules",
            "all",
        )
    )


def test_launch_server_refuses_a_port_in_use(golden_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refusal(launch("--model-path", str(golden_dir), "--port", port))


def test_launch_server_refuses_an_unknown_flag(golden_dir):
    error = refusal(launch("--model-path", str(golden_dir), DSV4_PRECISON="exact"))
    assert "DSV4_PRECISON" in error and "DSV4_PRECISION" in error


def test_launch_server_refuses_another_host(golden_dir, tmp_path):
    record = tmp_path / "sglang-0.5.99.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.99\n")
    error = refusal(launch("--model-path", str(golden_dir), PYTHONPATH=str(tmp_path)))
    assert "0.5.99" in error and "0.5.23" in error
