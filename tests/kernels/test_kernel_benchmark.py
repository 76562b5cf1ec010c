"""The check path of benchmarks/kernels.py, interpreted: every operator passes, and what is broken
is found and not timed."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernel_cases  # noqa: E402
import kernels  # noqa: E402

from dsv4_plugin.ops.operator import OPERATORS  # noqa: E402


def run(tmp_path: Path, *words: str) -> tuple[int, dict]:
    """(exit status, the file that the run wrote)."""
    path = tmp_path / "result.json"
    status = kernels.main(["--check-only", "--model", "flash-tp8", "--out", str(path), *words])
    return status, json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize("operator", kernel_cases.NAMES)
def test_every_operator_passes(operator, tmp_path, capsys):
    status, result = run(tmp_path, operator)
    assert status == 0 and not result["wrong"], capsys.readouterr().out
    assert {row["operator"] for row in result["rows"]} == {operator}
    phases = {row["case"].split()[0] for row in result["rows"]}
    assert phases == {"decode", "prefill"}
    for row in result["rows"]:
        assert (
            row["implementation"] == "triton"
            and row["check"]["error"] <= row["check"]["limit"]
            and row["check"]["rows"] > 0
        )
        assert row["floor"]["bytes"] > 0 and "times" not in row
    assert result["environment"]["device"] == "cpu" and "peaks" not in result
    assert {"arch", "driver", "torch", "triton", "dsv4_plugin", "commit", "date"} <= result[
        "environment"
    ].keys()


@pytest.fixture
def broken(monkeypatch):
    """Puts a function in the place of an operator's kernel; it is given the kernel and the
    arguments of a call."""

    def put(operator: str, function) -> None:
        implementation = OPERATORS[operator].implementations["triton"]
        kernel, module = implementation.load(), types.ModuleType("broken_kernel")
        module.run = lambda *arguments: function(kernel, *arguments)
        monkeypatch.setitem(sys.modules, "broken_kernel", module)
        monkeypatch.setitem(
            OPERATORS[operator].implementations,
            "triton",
            dataclasses.replace(implementation, path="broken_kernel:run"),
        )

    return put


def one_number_off(kernel, logits, visible, topk):
    out = kernel(logits, visible, topk)
    out[-1, 0] += 1
    return out


def last_latent_not_stored(kernel, q, kv, weight, eps, cos, sin, slots, cache):
    slots = slots.clone()
    slots[-1] = -1
    return kernel(q, kv, weight, eps, cos, sin, slots, cache)


def one_entry_not_stored(kernel, *arguments):
    rows = arguments[2]
    return kernel(
        *arguments[:2],
        dataclasses.replace(rows, slots=torch.full_like(rows.slots, -1)),
        *arguments[3:],
    )


def row_not_kept(kernel, *arguments):
    rows = arguments[2]
    return kernel(
        *arguments[:2],
        dataclasses.replace(rows, ring_write_row=torch.full_like(rows.ring_write_row, -1)),
        *arguments[3:],
    )


def never_written(kernel, q, weights, cos, sin, rounding):
    return torch.empty(q.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weights)


def out_of_registers(kernel, *arguments):
    raise RuntimeError("out of registers\nand more")


@pytest.mark.parametrize(
    ("operator", "function", "named"),
    [
        ("topk_select", one_number_off, "output: error inf"),
        ("qk_norm_rope_store", last_latent_not_stored, "cache: error inf"),
        ("compress", one_entry_not_stored, "cache: error inf"),
        ("compress", row_not_kept, "ring: error"),
        ("rope_hadamard_quant", never_written, "weighted queries: error inf"),
        ("build_step_plan", out_of_registers, "RuntimeError: out of registers"),
    ],
)
def test_a_broken_kernel_is_found_and_not_timed(
    operator, function, named, broken, tmp_path, capsys
):
    broken(operator, function)
    status, _ = run(
        tmp_path, operator, "rope_hadamard_quant" if operator == "build_step_plan" else operator
    )
    out, err = capsys.readouterr()
    assert status == 1 and "WRONG, not timed" in out and named in err
    assert all(line.startswith(f"error: {operator} triton, ") for line in err.splitlines())


def test_a_broken_kernel_does_not_stop_the_others(broken, tmp_path):
    broken("rope_hadamard_quant", out_of_registers)
    status, result = run(tmp_path, "rope_hadamard_quant", "topk_select")
    assert status == 1 and {each["operator"] for each in result["wrong"]} == {"rope_hadamard_quant"}
    assert {row["operator"] for row in result["rows"]} == {"topk_select"}


def test_a_peer_is_checked_too(tmp_path, monkeypatch):
    _, result = run(tmp_path, "topk_select")
    assert all(
        row["peers"] == [{"name": "torch.topk", "note": row["peers"][0]["note"]}]
        for row in result["rows"]
    )
    topk = torch.topk
    monkeypatch.setattr("kernel_peers.torch.topk", lambda x, k, **more: topk(-x, k, **more))
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda self, k, *more, **named: topk(self, k, *more, **named)
    )
    _, result = run(tmp_path, "topk_select")
    assert any(
        "differs from the reference" in row["peers"][0].get("absent", "") for row in result["rows"]
    )


def test_memory_and_time_bound_a_run(tmp_path, capsys):
    status, result = run(tmp_path, "topk_select", "--memory", "1e-9")
    assert status == 0 and result == {}, "nothing ran, so nothing is written"
    assert "skipped, needs" in capsys.readouterr().out
    status, result = run(tmp_path, "topk_select", "compress", "--time-limit", "0")
    assert status == 0 and result == {}
    out = capsys.readouterr().out
    assert "left out when the time was up" in out and "topk_select, decode 2 x 300, top 64" in out
