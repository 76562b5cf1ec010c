"""What is decided before the workers start, on the host's own argument records."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv4_plugin import device
from dsv4_plugin.cli import serve
from dsv4_plugin.host import launch, options
from dsv4_plugin.parallel import ParallelError
from dsv4_plugin.runtime import kernel_cache, kernel_wheel, precompile


@pytest.fixture(scope="module")
def server_args(golden_dir):
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(model_path=str(golden_dir), device="cpu")


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("--pp-size", "pp_size", 0),
        ("--attn-dp-size", "attn_dp_size", 0),
        ("--dp-size", "dp_size", 2),
        ("--attn-cp-size", "attn_cp_size", 2),
        ("--enable-prefill-cp", "enable_prefill_cp", True),
        ("--dcp-size", "dcp_size", 2),
        ("--moe-dp-size", "moe_dp_size", 2),
        ("--moe-a2a-backend", "moe_a2a_backend", "deepep"),
        ("--enable-eplb", "enable_eplb", True),
        ("--enable-two-batch-overlap", "enable_two_batch_overlap", True),
        ("--enable-lora", "enable_lora", True),
        ("--enable-hisparse", "enable_hisparse", True),
        ("--hicache-storage-backend", "hicache_storage_backend", "file"),
        ("--disaggregation-transfer-backend", "disaggregation_transfer_backend", "fake"),
        ("--speculative-algorithm", "speculative_algorithm", "NGRAM"),
        ("--speculative-eagle-topk", "speculative_eagle_topk", 2),
        ("--speculative-num-steps", "speculative_num_steps", 4),
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
    from dsv4_plugin.host.arguments import parser

    known = parser()._option_string_actions
    for option in (*options.OPTIONS, *options.CPU_OPTIONS):
        assert {known[name].dest for name in option.names} == {option.field}
        assert (known[option.name].nargs == 0) == (option.kind is bool), option.name
        assert option.refusal(getattr(server_args, option.field)) is None, option.name
    assert len({name for option in options.OPTIONS for name in option.names}) == sum(
        len(option.names) for option in options.OPTIONS
    )


def test_an_option_without_effect_is_named_and_is_one_of_the_host():
    from dsv4_plugin.host.arguments import parser

    names = [name for ignored in options.IGNORED for name in ignored.names]
    refused = {name for option in options.OPTIONS for name in option.names}
    assert set(names) <= parser()._option_string_actions.keys() - refused
    assert len(set(names)) == len(names)
    (sentence,) = options.without_effect(["--moe-runner-backend", "triton", "--tp-size=2"])
    assert sentence.startswith("--moe-runner-backend will have no effect: DSV4_ variables choose")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--max-total-tokens", "8192"], "leaves 768 tokens for the sliding windows"),
        (["--max-total-tokens", "8192", "--swa-full-tokens-ratio", "0.2"], ""),
        (["--max-total-tokens", "10240"], ""),
    ],
)
def test_the_windows_of_a_small_pool(golden_dir, words, named):
    refused = pytest.raises(launch.LaunchError, match=named or None)
    with refused if named else contextlib.nullcontext():
        launch.check_words(str(golden_dir), words)


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
        (["--chunked-prefill-size=512", "--attn-dp-size", "4"], "give a multiple of 1024"),
        (["--chunked-prefill-size=512", "--dp-size=4", "--enable-dp-attention"], "by 4 replicas"),
        (["--model-impl", "transformers"], "--model-impl transformers"),
        (["--nccl-port", "99999"], "a port is from 1 to 65535"),
        (["--dist-init-addr", "127.0.0.1:99999"], "an address and a port"),
        (["--dist-init-addr", ":5000"], "an address and a port"),
    ],
)
def test_words_of_a_command_line_are_refused_before_the_host_reads_them(golden_dir, words, named):
    with pytest.raises(launch.LaunchError, match=named):
        launch.check_words(str(golden_dir), words)


@pytest.mark.parametrize("there", [True, False])
def test_traces_need_a_package_of_their_own(golden_dir, monkeypatch, there):
    monkeypatch.setattr(options, "_installed", lambda module: there)
    refused = pytest.raises(launch.LaunchError, match="opentelemetry-sdk and .* not installed")
    with contextlib.nullcontext() if there else refused:
        launch.check_words(str(golden_dir), ["--enable-trace"])


def test_replicas_of_the_attention_have_two_spellings():
    for words in (["--attn-dp-size", "2"], ["--data-parallel-size=2", "--enable-dp-attention"]):
        given = options.given(words)
        assert (given.attn_dp_size, given.dp_size) == (2, None)
        assert not list(options.refusals(given))


@pytest.mark.parametrize(
    ("tp", "ep", "dp", "named"),
    [
        (4, 1, 3, "--attn-dp-size 3 does not divide --tp-size 4"),
        (4, 3, 1, "--ep-size 3 does not divide --tp-size 4"),
        (4, 4, 0, "--attn-dp-size 0 is no number of processes"),
        (3, 1, 1, "parallel size 3 does not divide num_attention_heads"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_the_host_is_imported(
    tiny_dir, tp, ep, dp, named
):
    launch.check_checkpoint(tiny_dir, 4, 4, 2)
    with pytest.raises((launch.LaunchError, ParallelError), match=named):
        launch.check_checkpoint(tiny_dir, tp, ep, dp)


def test_a_pipeline_has_no_more_stages_than_layers(tiny_dir):
    launch.check_checkpoint(tiny_dir, pp_size=6)
    with pytest.raises(launch.LaunchError, match="--pp-size 7 is more than the 6 layers"):
        launch.check_checkpoint(tiny_dir, pp_size=7)


@pytest.mark.parametrize(
    ("words", "environment", "named"),
    [
        (["--attn-dp-size", "2"], {}, "with --attn-dp-size; leave"),
        (["--dp-size", "2", "--enable-dp-attention"], {}, "with --attn-dp-size; leave"),
        (["--speculative-algorithm", "DSPARK"], {}, "with --speculative-algorithm; leave"),
        ([], {"DSV4_PROBE": "1"}, "with DSV4_PROBE=1; unset"),
    ],
)
def test_what_is_not_served_in_a_pipeline(golden_dir, monkeypatch, words, environment, named):
    launch.check_words(str(golden_dir), ["--pp-size", "2"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(launch.LaunchError, match=f"--pp-size 2 is not served {named}"):
        launch.check_words(str(golden_dir), ["--pp-size", "2", *words])


def test_the_document_shows_the_sizes():
    text = (Path(__file__).parents[2] / "docs" / "parallelism.md").read_text()
    assert options.sizes_markdown() in text


def test_words_that_are_fine_or_the_hosts_to_judge_pass(golden_dir):
    words = ["--chunked-prefill-size", "512", "--max-total-tokens", "16k", "--dp-size", "x"]
    launch.check_words(str(golden_dir), [*words, "--enable-metrics", "--dtype", "auto"])


@pytest.mark.parametrize("algorithm", ["EAGLE", "NEXTN"])
def test_an_mtp_block_drafts_on_a_cpu(server_args, golden_dir, tmp_path, monkeypatch, algorithm):
    monkeypatch.setenv("DSV4_DEVICE", "cpu")
    monkeypatch.setattr(server_args, "speculative_algorithm", algorithm)
    launch.check_arguments(server_args)
    config = json.loads((golden_dir / "config.json").read_text())
    ratios = [*config["compress_ratios"], 0]
    config |= {"num_nextn_predict_layers": 2, "compress_ratios": ratios}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(server_args, "model_path", str(tmp_path))
    with pytest.raises(launch.LaunchError, match=f"{tmp_path} holds 2; leave it out"):
        launch.check_arguments(server_args)
    monkeypatch.setattr(server_args, "model_path", str(golden_dir))
    monkeypatch.setattr(server_args, "device", "cuda")
    with pytest.raises(launch.LaunchError, match=f"{algorithm} was run on a CPU alone"):
        launch.check_arguments(server_args)


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


@pytest.mark.parametrize(
    "change, named",
    [
        ({}, None),
        ({"speculative_dspark_block_size": 3}, None),
        ({"speculative_dspark_block_size": 6}, "blocks of 5 tokens"),
        ({"speculative_draft_model_path": "/elsewhere"}, "model-path /elsewhere cannot be served"),
        ({"speculative_use_block_verification": True}, "accepted one by one"),
        ({"model_path": None}, "holds none"),
        ({"disaggregation_mode": "decode"}, "not served with --disaggregation-mode decode"),
        ({"enable_dp_attention": True}, "not served with data-parallel attention"),
        ({"enable_streaming_session": True}, "not served with --enable-streaming-session"),
    ],
)
def test_a_draft_is_served_as_the_checkpoint_holds_it(
    server_args, dspark_dir, monkeypatch, change, named
):
    monkeypatch.setenv("DSV4_DEVICE", "cpu")
    arguments = {"speculative_algorithm": "DSPARK", "model_path": str(dspark_dir)} | change
    if arguments["model_path"] is None:  # one with an MTP block
        del arguments["model_path"]
    for name, value in arguments.items():
        monkeypatch.setattr(server_args, name, value)
    refused = pytest.raises(launch.LaunchError, match=named or None)
    with refused if named else contextlib.nullcontext():
        launch.check_arguments(server_args)


def test_lengths_of_verification_by_confidence_are_not_captured(
    server_args, dspark_dir, monkeypatch
):
    monkeypatch.setenv("DSV4_DEVICE", "cpu")
    monkeypatch.setenv("SGLANG_RAGGED_VERIFY_MODE", "compact")
    monkeypatch.setattr(server_args, "model_path", str(dspark_dir))
    monkeypatch.setattr(server_args, "speculative_algorithm", "DSPARK")
    launch.check_arguments(server_args)
    monkeypatch.setattr(server_args, "device", "cuda")
    with pytest.raises(launch.LaunchError, match="VERIFY_MODE=compact cannot be served on a GPU"):
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


class TestKernelsBeforeAStart:
    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch, tmp_path):
        monkeypatch.setattr(device, "arch", lambda: "gfx950")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))

    def line(self, golden_dir, *words) -> str | None:
        parser = argparse.ArgumentParser()
        serve.add_arguments(parser)
        words = [str(golden_dir), *words]
        arguments, arguments.other = parser.parse_known_args(words)
        return serve.kernel_line(arguments)

    def test_those_that_are_missing_are_compiled(self, golden_dir, tmp_path, capfd, monkeypatch):
        """Or taken from a wheel. The golden model's sizes are too small for most kernels; those of
        the plan are there."""
        words = "--chunked-prefill-size 256 --max-running-requests 1 --context-length 512".split()
        first = self.line(golden_dir, *words)
        assert "building those that the cache lacks of" in capfd.readouterr().out
        kernels, compiled = map(int, re.findall(r"(\d+) (?:in the cache|of them compiled)", first))
        assert kernels == compiled == len(list(tmp_path.glob("*/*/*.hsaco"))) > 5
        assert f"kernels: {kernels} in the cache, 0 of them" in self.line(golden_dir, *words)

        wheels, site = tmp_path / "wheels", tmp_path / "site"
        (path,) = (tmp_path / "kernels").glob("dsv4-golden-*.json")
        wheel = kernel_wheel.write(kernel_cache.Manifest.read(path), path.parent, wheels)
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
        subprocess.run([*install, "--target", str(site), str(wheel)], check=True)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another machine"))
        assert f"kernels: {kernels} in the cache, 0 of them" in self.line(golden_dir, *words)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "one of other versions"))
        monkeypatch.setattr(kernel_cache, "sources", lambda: "another source")
        built = kernel_cache.Built(kernel_cache.Manifest.read(path), 0, 0, 0.0)
        monkeypatch.setattr(kernel_cache, "build", lambda *arguments: built)
        assert "an installed wheel are not taken: " in self.line(golden_dir, *words)

    def test_one_that_does_not_compile_stops_no_start(self, golden_dir, monkeypatch):
        def build(*arguments):
            raise precompile.BuildError("moe_kernel does not compile for gfx950: no")

        monkeypatch.setattr("dsv4_plugin.runtime.kernel_cache.build", build)
        assert "compile when they are first needed: moe_kernel does" in self.line(golden_dir)

    def test_not_on_a_cpu_not_in_exact_and_not_unwanted(self, golden_dir, monkeypatch):
        assert self.line(golden_dir, "--cpu") is None
        monkeypatch.setenv("DSV4_PRECISION", "exact")
        assert self.line(golden_dir) is None
        monkeypatch.setenv("DSV4_PRECISION", "serving")
        monkeypatch.setenv("DSV4_BUILD", "0")
        assert self.line(golden_dir) is None


def test_parsers_give_way_to_the_user():
    # SGLang takes its parsers of this model together or not at all
    assert chosen("--reasoning-parser", "qwen3")[1] == []
    assert chosen("--tool-call-parser=qwen25")[1] == []
    assert chosen("--reasoning-parser", "none")[1] == ["--tool-call-parser", "deepseekv4"]
    for mixed in (("qwen3", "deepseekv4"), ("deepseek-v4", "qwen")):
        with pytest.raises(launch.LaunchError, match="cannot be served together"):
            launch._check_parsers(*mixed)
    for fine in ((None, None), ("qwen3", "qwen"), ("deepseek-v4", "deepseekv4"), (None, "qwen")):
        launch._check_parsers(*fine)
    words = ["--reasoning-parser", "none", "--tool-call-parser=none", "--enable-metrics"]
    assert chosen(*words)[1] == []
    assert serve._without_parsers(words) == ["--enable-metrics"]


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5})
    assert chosen("--cpu", "--tp", "2")[0]["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|4,5"
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert chosen("--cpu", "--tp", "2")[0]["SGLANG_CPU_OMP_THREADS_BIND"] == "3|3"
