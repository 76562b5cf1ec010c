"""What a kernel cannot take is refused with its reason, on a pretended GPU: every requirement
function by its reasons, and the whole model in every precision under `auto`."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin import device
from dsv4_plugin.cache import PackedLatentCache, latent_page_bytes
from dsv4_plugin.cache.stores import DenseLatentCache, PackedIndexCache
from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.host import kernels, version  # noqa: F401  all operators' implementations
from dsv4_plugin.kernels.flydsl.prepared import FP4_LAYOUT, GATE_UP, PreparedExperts
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.ops import operator as selection
from dsv4_plugin.ops.operator import OPERATORS, Implementation
from dsv4_plugin.runtime.cases import cases, sizes
from dsv4_plugin.runtime.engine import Engine

SERVING_KERNELS = {
    "compress": "not a Packed",
    "indexer_logits": "not packed",
    "moe": "not bfloat16",
    "qk_norm_rope_store": "not packed",
    "rope_hadamard_quant": "not fp8",
    "route": "not bfloat16",
    "shared_expert": "not bfloat16",
    "sparse_mla": "not packed",
}
"""Kernels for the data of serving, and why they do not take that of the other precisions."""
ANY_PRECISION = {"build_step_plan", "topk_select"}
"""Kernels that take every precision's data."""


@pytest.fixture
def gpu(monkeypatch):
    """As on a gfx950 GPU, whose kernels are the references under another name."""
    monkeypatch.setattr(device, "arch", lambda: "gfx950")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)

    def load(implementation):
        [owner] = [
            each for each in OPERATORS.values() if implementation in each.implementations.values()
        ]
        return owner.reference

    monkeypatch.setattr(Implementation, "load", load)
    selection.configure()
    yield
    monkeypatch.undo()
    selection.configure()


def ran(tiny_dir, precision: Precision) -> dict[str, tuple[set[str], str]]:
    """(implementations, all reasons) by operator, after a prefill and a decode step."""
    model = DeepseekV4(Geometry.from_dir(tiny_dir), precision, parts="backbone")
    load_checkpoint(model, tiny_dir)
    selection.forget()
    engine = Engine(model, max_tokens=1024, max_requests=1)
    engine.generate([list(range(300))], 2)
    found: dict[str, tuple[set[str], str]] = {}
    for row in selection.report_rows():
        names, reasons = found.get(row.operator, (set(), ""))
        found[row.operator] = names | {row.implementation}, reasons + str(row.rejected)
    return found


@pytest.mark.parametrize("precision", [Precision.EXACT, Precision.OFFICIAL])
def test_auto_on_a_gpu_leaves_precise_data_to_the_references(gpu, tiny_dir, precision):
    found = ran(tiny_dir, precision)
    for operator, reason in SERVING_KERNELS.items():
        names, reasons = found[operator]
        assert names == {"reference"} and reason in reasons, operator
    for operator in ANY_PRECISION:
        assert found[operator][0] == {"triton"}


def test_auto_on_a_gpu_serves_with_kernels(gpu, tiny_dir):
    found = ran(tiny_dir, Precision.SERVING)
    for operator in SERVING_KERNELS.keys() | ANY_PRECISION:
        first = next(iter(OPERATORS[operator].implementations))
        assert found[operator] == ({first}, "{}" * found[operator][1].count("{}")), operator


def latent_cache(slots_per_page: int) -> PackedLatentCache:
    return PackedLatentCache(
        torch.zeros(2, latent_page_bytes(slots_per_page), dtype=torch.uint8), slots_per_page
    )


def rows(*shape: int) -> torch.Tensor:
    """Two rows of bf16."""
    return torch.zeros(2, *shape, dtype=torch.bfloat16)


DENSE = DenseLatentCache(4, rounded=False)
INDEX_QUERIES = torch.zeros(2, 64, 128, dtype=torch.float8_e4m3fn)
PREPARED = PreparedExperts(
    torch.zeros(1, 256, 256, dtype=torch.uint8),
    torch.zeros(1, 256, 16, dtype=torch.uint8),
    GATE_UP,
    FP4_LAYOUT,
)
WRONG = [
    (
        "compress",
        "triton",
        {"cache": DENSE},
        "the cache is a DenseLatentCache, not a PackedLatentCache",
    ),
    (
        "compress",
        "triton",
        {"cache": PackedIndexCache(torch.zeros(1, 64 * 132, dtype=torch.uint8))},
        "the cache is a PackedIndexCache, not a PackedLatentCache",
    ),
    ("compress", "triton", {"rotate": True}, "not a PackedIndexCache"),
    ("compress", "triton", {"dtype": torch.float32}, "activations are torch.float32"),
    (
        "indexer_logits",
        "triton",
        {"cache": DENSE},
        "the index cache is a DenseLatentCache, not packed",
    ),
    ("indexer_logits", "triton", {"q": torch.float32}, "q is torch.float32, not float8_e4m3fn"),
    ("indexer_logits", "triton", {"q": torch.bfloat16}, "q is torch.bfloat16, not float8_e4m3fn"),
    ("qk_norm_rope_store", "triton", {"cache": DENSE}, "the window cache is a DenseLatentCache"),
    ("qk_norm_rope_store", "triton", {"q": torch.float32}, "q is torch.float32 and kv"),
    ("qk_norm_rope_store", "triton", {"kv": torch.float32}, "kv torch.float32, not bfloat16"),
    ("block_fp8_linear", "triton", {"scale": None}, "the weight is dense"),
    ("block_fp8_linear", "triton", {"x": torch.float32}, "x is torch.float32, not bfloat16"),
    ("block_fp8_linear", "triton", {"x": rows(200)}, "200 channels are no multiple of 128"),
    ("linear_fp32", "triton", {"x": torch.float32}, "x is torch.float32 and the weight torch.bf"),
    ("linear_fp32", "triton", {"weight": torch.float32}, "the weight torch.float32, not bfloat16"),
    ("linear_fp32", "triton", {"x": rows(200)}, "200 channels are no multiple of 64"),
    ("grouped_output", "triton", {"o": torch.float32}, "o is torch.float32, not bfloat16"),
    ("grouped_output", "triton", {"groups": 4}, "a group has 64 results, no multiple of 128"),
    ("rms_norm_quant", "triton", {"x": torch.float32}, "x is torch.float32, not bfloat16"),
    ("rms_norm_quant", "triton", {"x": rows(200)}, "200 channels are no multiple of 128"),
    ("rms_norm_quant", "triton", {"x": rows(256)[:, ::2]}, "channels of x do not lie side by side"),
    ("mhc_pre", "triton", {"streams": torch.float32}, "the streams are torch.float32"),
    ("mhc_pre", "triton", {"streams": rows(3, 512)}, "there are 3 streams, not 4"),
    ("mhc_pre", "triton", {"streams": rows(4, 200)}, "200 channels are no multiple of 128"),
    ("mhc_post", "triton", {"streams": torch.float32}, "the streams are torch.float32"),
    ("mhc_post_pre", "triton", {"streams": rows(3, 512)}, "there are 3 streams, not 4"),
    ("mhc_head", "triton", {"streams": rows(4, 200)}, "200 channels are no multiple of 128"),
    ("rope_hadamard_quant", "triton", {"rounding": "fp4"}, "rounding is fp4, not fp8"),
    ("rope_hadamard_quant", "triton", {"rounding": "none"}, "rounding is none, not fp8"),
    ("rope_hadamard_quant", "triton", {"q": torch.float32}, "q is torch.float32, not bfloat16"),
    ("block_fp8_linear", "aiter", {"scale": None}, "the weight is dense"),
    ("rms_norm_quant", "aiter", {"x": torch.float32}, "x is torch.float32, not bfloat16"),
    ("rms_norm_quant", "aiter", {"weight": torch.float32}, "the weight is torch.float32, not bfl"),
    ("rms_norm_quant", "aiter", {"x": rows(8320)}, "8320 channels are more than 8,192"),
    ("mhc_pre", "aiter", {"streams": rows(3, 4096)}, "there are 3 streams, not 4"),
    ("mhc_pre", "aiter", {"streams": rows(4, 5120)}, "5120 channels are none of 7168, 4096, 2560"),
    ("mhc_post_pre", "aiter", {"streams": rows(4, 5120)}, "5120 channels are none of 7168, 4096"),
    ("mhc_post", "aiter", {"streams": rows(4, 384)}, "384 channels are no multiple of 256"),
    ("rope_hadamard_quant", "aiter", {"rounding": "fp4"}, "rounding is fp4, not fp8"),
    ("rope_hadamard_quant", "aiter", {"q": rows(12, 128)}, "12 heads are no power of two"),
    ("sample_greedy", "aiter", {"logits": torch.float64}, "torch.float64, neither float32 nor"),
    ("sample_greedy", "aiter", {"logits": rows(200)}, "a row of 200 logits is no multiple of 16"),
    ("sparse_mla", "aiter", {"window_cache": DENSE}, "the window cache is a DenseLatentCache"),
    (
        "sparse_mla",
        "aiter",
        {"window": torch.zeros(2, 0, dtype=torch.int64)},
        "a window of no columns",
    ),
    ("sparse_mla", "tilelang", {"window_cache": DENSE}, "the window cache is a DenseLatentCache"),
    (
        "sparse_mla",
        "tilelang",
        {"window": torch.zeros(2, 0, dtype=torch.int64)},
        "a window of no columns",
    ),
    ("rms_norm_quant", "host", {"keep": "normed"}, "keep is normed, and the host's kernel always"),
    ("rms_norm_quant", "host", {"x": torch.float32}, "x is torch.float32, not bfloat16"),
    ("block_fp8_linear", "host", {"scale": None}, "the weight is dense"),
    ("indexer_logits", "tilelang", {"q": torch.float32}, "q is torch.float32, not float8_e4m3fn"),
    ("mhc_pre", "tilelang", {"streams": torch.float32}, "the streams are torch.float32"),
    ("mhc_post", "tilelang", {"streams": rows(3, 512)}, "there are 3 streams, not 4"),
    ("mhc_post_pre", "tilelang", {"streams": rows(4, 200)}, "200 channels are no multiple of 128"),
    ("indexer_logits", "host", {"q": torch.float32}, "q is torch.float32, not float8_e4m3fn"),
    ("indexer_logits", "host", {"q": INDEX_QUERIES[:, :8]}, "8 heads are neither 32 nor 64"),
    ("sparse_mla", "host", {"window_cache": DENSE}, "the window cache is a DenseLatentCache"),
    ("route", "triton", {"x": torch.float32}, "x is torch.float32, not bfloat16"),
    (
        "route",
        "triton",
        {"x": torch.zeros(2, 200, dtype=torch.bfloat16)},
        "hidden size 200 is not a multiple of 128",
    ),
    ("moe", "triton", {"x": torch.float32}, "x is torch.float32, not bfloat16"),
    ("moe", "triton", {"w1": PREPARED}, "the weights are prepared for flydsl"),
    ("moe", "flydsl", {"x": torch.float32}, "x is torch.float32, not bfloat16"),
    ("moe", "flydsl", {"w1": torch.zeros(2, 128, 256)}, "were not prepared for it"),
    (
        "moe",
        "triton",
        {"x": torch.zeros(2, 200, dtype=torch.bfloat16)},
        "hidden size 200 is not a multiple of 128",
    ),
    ("shared_expert", "triton", {"x": torch.float32}, "x is torch.float32, not bfloat16"),
    (
        "shared_expert",
        "triton",
        {"x": torch.zeros(2, 200, dtype=torch.bfloat16)},
        "hidden size 200 is not a multiple of 128",
    ),
    *(
        (operator, "triton", change, reason)
        for operator in ("moe", "shared_expert")
        for change, reason in (
            ({"x": torch.float32}, "x is torch.float32, not bfloat16"),
            ({"x": torch.zeros(2, 200, dtype=torch.bfloat16)}, "200 is not a multiple of 128"),
        )
    ),
    ("sample_greedy", "triton", {"logits": torch.float64}, "torch.float64, neither float32 nor"),
    ("sample_greedy", "triton", {"logits": rows(8).T}, "of a row do not lie side by side"),
    ("sparse_mla", "triton", {"window_cache": DENSE}, "the window cache is a DenseLatentCache"),
    (
        "sparse_mla",
        "triton",
        {"compressed_cache": DENSE},
        "the compressed cache is a DenseLatentCache",
    ),
    ("sparse_mla", "triton", {"q": torch.float32}, "q is torch.float32, not bfloat16"),
    ("sparse_mla", "gluon", {"window_cache": DENSE}, "the window cache is a DenseLatentCache"),
    (
        "sparse_mla",
        "gluon",
        {"compressed_cache": DENSE},
        "the compressed cache is a DenseLatentCache",
    ),
    ("sparse_mla", "gluon", {"q": torch.float32}, "q is torch.float32, not bfloat16"),
    ("sparse_mla", "gluon", {"window_cache": latent_cache(96)}, "pages of 96 slots, which is no"),
    ("sparse_mla", "gluon", {"compressed_cache": latent_cache(3)}, "pages of 3 slots, which is no"),
    (
        "sparse_mla",
        "gluon",
        {"window": torch.zeros(2, 0, dtype=torch.int64)},
        "a window of no columns",
    ),
]


RIGHT = {
    ("moe", "flydsl"): {"w1": PREPARED},
    ("mhc_pre", "aiter"): {"streams": rows(4, 4096)},
    ("mhc_post_pre", "aiter"): {"streams": rows(4, 4096)},
    ("indexer_logits", "host"): {"q": INDEX_QUERIES},
}
"""Arguments in place of the others for those whose kernel is compiled for released sizes alone."""


def arguments_of(operator: str) -> dict:
    """What a decode step gives it, in an order that is that of its parameters."""
    from dsv4_plugin.runtime.compare import bound

    size = sizes("pro", torch.device("cpu"), quick=True)[1]
    calls = cases(operator, size, torch.device("cpu"), seed=1)
    every = [bound(OPERATORS[operator], case.arguments(), {}) for case in calls]
    return next(
        each
        for each in every
        if each.get("rotate") is not True and each.get("compressed_cache", DENSE) is not None
    )


@pytest.mark.parametrize(
    ("operator", "name", "change", "reason"),
    WRONG,
    ids=[f"{operator}-{name}-{reason[:30]}" for operator, name, _, reason in WRONG],
)
def test_every_reason_of_every_requirement(operator, name, change, reason):
    requires = OPERATORS[operator].implementations[name].requires
    right = arguments_of(operator) | RIGHT.get((operator, name), {})
    assert requires(*right.values()) is None
    for argument, value in change.items():
        known = right[argument]
        retyped = isinstance(value, torch.dtype) and isinstance(known, torch.Tensor)
        right[argument] = known.to(value) if retyped else value
    assert reason in requires(*right.values())


def test_another_host_is_refused_with_its_version(monkeypatch):
    requires = OPERATORS["sparse_mla"].implementations["host"].requires
    right = arguments_of("sparse_mla").values()
    monkeypatch.setattr(version, "installed", lambda: "0.5.22")
    assert "SGLang 0.5.22 is installed" in requires(*right)
    monkeypatch.undo()
    assert requires(*right) is None


def test_no_requirement_is_left_out():
    """A kernel with a requirement function has its reasons in WRONG."""
    asked = {
        (operator, name)
        for operator, each in OPERATORS.items()
        for name, implementation in each.implementations.items()
        if implementation.requires is not None
    }
    assert asked == {(operator, name) for operator, name, *_ in WRONG}
