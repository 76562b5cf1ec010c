"""What is decided before the workers start, on the host's own argument records."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv4_plugin.cli import serve
from dsv4_plugin.host import launch, options


@pytest.fixture(scope="module")
def server_args(golden_dir):
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(model_path=str(golden_dir), device="cpu")


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("--pp-size", "pp_size", 2),
        ("--attn-dp-size", "attn_dp_size", 2),
        ("--enable-dp-attention", "enable_dp_attention", True),
        ("--attn-cp-size", "attn_cp_size", 2),
        ("--enable-prefill-cp", "enable_prefill_cp", True),
        ("--dcp-size", "dcp_size", 2),
        ("--moe-dp-size", "moe_dp_size", 2),
        ("--moe-a2a-backend", "moe_a2a_backend", "deepep"),
        ("--enable-eplb", "enable_eplb", True),
        ("--enable-two-batch-overlap", "enable_two_batch_overlap", True),
        ("--enable-lora", "enable_lora", True),
        ("--enable-hisparse", "enable_hisparse", True),
        ("--enable-hierarchical-cache", "enable_hierarchical_cache", True),
        ("--disaggregation-mode", "disaggregation_mode", "prefill"),
        ("--speculative-algorithm", "speculative_algorithm", "EAGLE"),
        ("--dtype", "dtype", "float16"),
        ("--quantization", "quantization", "awq"),
        ("--kv-cache-dtype", "kv_cache_dtype", "bfloat16"),
        ("--json-model-override-args", "json_model_override_args", '{"num_hidden_layers": 1}'),
        ("--disable-hybrid-swa-memory", "disable_hybrid_swa_memory", True),
        ("--model-impl", "model_impl", "transformers"),
        ("--chunked-prefill-size", "chunked_prefill_size", 300),
        ("--is-embedding", "is_embedding", True),
        ("--load-format", "load_format", "npcache"),
        ("--grpc-port", "grpc_port", 1),
        ("--max-prefill-tokens", "max_prefill_tokens", 0),
        ("--mem-fraction-static", "mem_fraction_static", 1.5),
    ],
)
def test_arguments_that_mean_nothing_here_are_refused(server_args, monkeypatch, name, field, value):
    monkeypatch.setenv("DSV4_DEVICE", "cpu")
    launch.check_arguments(server_args)
    assert hasattr(server_args, field)
    monkeypatch.setattr(server_args, field, value)
    with pytest.raises(
        launch.LaunchError, match=f"{name}.* (asks for .*DSV4_PLUGIN=0|cannot be served)"
    ):
        launch.check_arguments(server_args)


def test_every_option_of_the_table_is_one_of_the_host_and_its_default_is_served(server_args):
    from dsv4_plugin.host.arguments import _parser

    known = _parser()._option_string_actions
    for option in options.OPTIONS:
        assert {known[name].dest for name in option.names} == {option.field}
        assert (known[option.name].nargs == 0) == (option.kind is bool), option.name
        assert option.refusal(getattr(server_args, option.field)) is None, option.name
    assert len({name for option in options.OPTIONS for name in option.names}) == sum(
        len(option.names) for option in options.OPTIONS
    )


def test_the_document_shows_the_table():
    text = (Path(__file__).parents[2] / "docs" / "host.md").read_text()
    assert options.markdown() in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--enable-lora"], "--enable-lora asks"),
        (["--dp-size=2"], "--dp-size 2 asks"),
        (["--data-parallel-size", "2"], "--dp-size 2 asks"),
        (["--chunked-prefill-size", "300"], "multiple of the page of 256"),
        (["--model-impl", "transformers"], "--model-impl transformers"),
    ],
)
def test_words_of_a_command_line_are_refused_before_the_host_reads_them(golden_dir, words, named):
    with pytest.raises(launch.LaunchError, match=named):
        launch.check_words(str(golden_dir), words)


def test_words_that_are_fine_or_the_hosts_to_judge_pass(golden_dir):
    words = ["--chunked-prefill-size", "512", "--max-total-tokens", "16k", "--dp-size", "x"]
    launch.check_words(str(golden_dir), [*words, "--enable-metrics", "--dtype", "auto"])


@pytest.mark.parametrize("algorithm", ["EAGLE", "NEXTN"])
def test_another_draft_than_the_checkpoints_is_refused(
    server_args, dspark_dir, monkeypatch, algorithm
):
    monkeypatch.setenv("DSV4_DEVICE", "cpu")
    monkeypatch.setattr(server_args, "model_path", str(dspark_dir))
    launch.check_arguments(server_args)
    monkeypatch.setattr(server_args, "speculative_algorithm", algorithm)
    with pytest.raises(
        launch.LaunchError, match=f"{algorithm} .*{dspark_dir} holds a DSpark draft"
    ):
        launch.check_arguments(server_args)


@pytest.mark.parametrize("device, wanted", [("cpu", "auto"), ("cuda", "cpu")])
def test_device_and_platform_must_agree(server_args, monkeypatch, device, wanted):
    monkeypatch.setenv("DSV4_DEVICE", wanted)
    monkeypatch.setattr(server_args, "device", device)
    with pytest.raises(
        launch.LaunchError, match=f"the device is {device} while DSV4_DEVICE={wanted}"
    ):
        launch.check_arguments(server_args)


def test_requests_come_in_where_they_are_checked(server_args, monkeypatch):
    monkeypatch.setenv("DSV4_DEVICE", "cpu")
    monkeypatch.setenv("SGLANG_RUST_SERVER", "0")
    launch.check_arguments(server_args)
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(launch.LaunchError, match="SGLANG_RUST_SERVER.*unset it"):
        launch.check_arguments(server_args)


def test_what_is_decided_on_a_gpu(monkeypatch):
    from sglang.srt.model_executor.cuda_graph_config import Backend, default_cuda_graph_config

    monkeypatch.delenv("SGLANG_ENABLE_WAR_BARRIER", raising=False)
    config = default_cuda_graph_config()
    decided = launch._on_gpu(SimpleNamespace(cuda_graph_config=config))
    graphs = decided.pop("cuda_graph_config")
    assert graphs.decode.backend == config.decode.backend == Backend.FULL
    assert graphs.prefill.backend == Backend.DISABLED
    assert decided == {"disable_flashinfer_autotune": True}
    assert os.environ["SGLANG_ENABLE_WAR_BARRIER"] == "1"
    monkeypatch.setenv("SGLANG_ENABLE_WAR_BARRIER", "0")  # a user's word stands
    launch._on_gpu(SimpleNamespace(cuda_graph_config=config))
    assert os.environ["SGLANG_ENABLE_WAR_BARRIER"] == "0"


def test_hub_names_and_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert launch.is_hub_name("deepseek-ai/DeepSeek-V4-Flash")
    assert not any(
        map(launch.is_hub_name, ("models/tiny", "/models/tiny", "./tiny", "tiny", "a/b/c"))
    )


def chosen(*words: str):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments, arguments.other = parser.parse_known_args(["model", *words])
    return serve.choices(arguments)


def test_choices_of_dsv4_serve(monkeypatch):
    for name in ("DSV4_STRICT", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "SGLANG_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    parsers = ["--reasoning-parser", "deepseek-v4", "--tool-call-parser", "deepseekv4"]
    assert chosen() == ({"DSV4_STRICT": "1"}, parsers)
    environment, added = chosen("--cpu")
    assert environment["DSV4_DEVICE"] == "cpu" and added[:6] == [*parsers, "--device", "cpu"]
    assert environment["GOMP_SPINCOUNT"] == str(serve.CPU_SPIN_COUNT)
    assert added[added.index("--max-total-tokens") + 1] == str(serve.CPU_POOL_TOKENS)
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in environment


def test_choices_give_way_to_the_user(monkeypatch):
    monkeypatch.setenv("DSV4_STRICT", "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    environment, added = chosen("--cpu", "--tp", "2", "--max-total-tokens=4096")
    assert environment == {"DSV4_DEVICE": "cpu"} and "--max-total-tokens" not in added


def test_parsers_give_way_to_the_user():
    assert chosen("--reasoning-parser", "qwen3")[1] == ["--tool-call-parser", "deepseekv4"]
    words = ["--reasoning-parser", "none", "--tool-call-parser=none", "--enable-metrics"]
    assert chosen(*words)[1] == []
    assert serve._without_parsers(words) == ["--enable-metrics"]


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5})
    assert chosen("--cpu", "--tp", "2")[0]["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|4,5"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert chosen("--cpu", "--tp", "2")[0]["SGLANG_CPU_OMP_THREADS_BIND"] == "3|3"
