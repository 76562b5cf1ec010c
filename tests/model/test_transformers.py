"""The whole model in exact precision against transformers in fp32, on random configurations.

Both read the same checkpoint in the released format, each with its own decoding of FP8 and FP4.
"""

from __future__ import annotations

import random

import pytest
import torch

from dsv4_plugin.checkpoint.load import load_checkpoint
from dsv4_plugin.checkpoint.tiny import tiny_config, write_tiny
from dsv4_plugin.config import Geometry, Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.runtime import Engine


def random_config(seed: int) -> dict:
    """A small model whose layout no release has."""
    choose = random.Random(seed)
    layers = choose.randint(2, 4)
    ratios = [choose.choice([0, 4, 128]) for _ in range(layers - 1)]
    ratios.insert(choose.randrange(layers), 4)  # the part with the most to go wrong
    groups, experts = choose.choice([1, 2, 4]), choose.choice([4, 8])
    config = tiny_config(
        layers=layers,
        hidden=choose.choice([128, 256]),
        experts=experts,
        heads=groups * choose.choice([1, 2, 3]),
        experts_per_token=choose.randint(1, experts),
        o_groups=groups,
        intermediate=choose.choice([128, 256]),
        index_topk=choose.choice([1, 5, 16, 33]),
        compress_ratios=ratios,
        expert_dtype=choose.choice(["fp4", "fp8"]),
    )
    config["rope_scaling"] |= {
        "factor": choose.choice([4, 16, 40]),
        "original_max_position_embeddings": choose.choice([4096, 65536]),
    }
    return config | {
        "num_hash_layers": choose.randint(0, layers),
        "q_lora_rank": choose.choice([128, 256]),
        "index_n_heads": choose.choice([16, 32]),
        "swiglu_limit": choose.choice([0.5, 7.0, 10.0]),
        "routed_scaling_factor": choose.choice([1.0, 1.5, 2.5]),
        "hc_sinkhorn_iters": choose.choice([1, 3, 20]),
        "rope_theta": choose.choice([10000, 50000]),
        "compress_rope_theta": choose.choice([40000, 160000]),
    }


class Pair:
    """One checkpoint in both implementations."""

    def __init__(self, directory, config: dict, seed: int):
        from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config
        from transformers.utils import logging

        logging.disable_progress_bar()
        write_tiny(directory, config, seed=seed)
        self.config = config
        model = DeepseekV4(Geometry.from_dir(directory), Precision.EXACT)
        load_checkpoint(model, directory)
        self.engine = Engine(model, max_tokens=1024, max_requests=2, page_seed=seed)
        # Decoded to fp32: the bf16 that config.json names cannot hold a Base scale times an FP8
        # value.
        self.other = (
            DeepseekV4ForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                quantization_config=FineGrainedFP8Config(dequantize=True),
                attn_implementation="eager",
                experts_implementation="eager",
            )
            .float()
            .eval()
        )

    def prompt(self, length: int) -> list[int]:
        return torch.randint(
            0, self.config["vocab_size"], (length,), generator=torch.Generator().manual_seed(length)
        ).tolist()

    def distance(self, prompt: list[int], chunks: list[int] | None = None) -> float:
        got = self.engine.score(prompt, chunks)
        with torch.inference_mode():
            want = self.other(torch.tensor([prompt]), use_cache=False).logits[0]
        assert got.isfinite().all() and want.std() > 0.5  # logits that say something
        return (got - want).abs().max().item()


# fp32 sums in another order, through up to four layers: 3e-6 for logits near 1 (docs/model.md §6,
# "Oracle status"), and these reach 10. A flipped selection or expert would show as 1e-2 or more.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def flash_like(tmp_path_factory) -> Pair:
    directory = tmp_path_factory.mktemp("transformers") / "flash"
    return Pair(
        directory,
        tiny_config(
            layers=4, hidden=128, intermediate=128, index_topk=16, compress_ratios=[0, 4, 128, 4]
        ),
        1,
    )


@pytest.mark.parametrize(
    "length", [1, 2, 3, 4, 5, 7, 8, 127, 128, 129, 131, 255, 256, 257, 259, 300]
)
def test_lengths(flash_like, length):
    assert flash_like.distance(flash_like.prompt(length)) <= TOLERANCE


@pytest.mark.parametrize("chunks", [[1, 2, 1, 124, 129], [256, 1, 43], [100, 100, 57]], ids=str)
def test_chunks(flash_like, chunks):
    assert flash_like.distance(flash_like.prompt(sum(chunks)), chunks) <= TOLERANCE


# Seeds whose closest decision, index selection or expert, is 9e-5 standard deviations wide:
# rounding moves it by 1e-6.
@pytest.mark.parametrize("seed", [0, 10, 12, 13, 19, 20])
def test_random_configurations(tmp_path, seed):
    config = random_config(seed)
    pair = Pair(tmp_path / "model", config, seed)
    length = 261 + 2 * seed
    d = pair.distance(pair.prompt(length), [length - 90, 1, 89])
    print(
        f"ratios {config['compress_ratios']}, {config['num_hash_layers']} hash layers: max |dlogit|"
        f" {d:.1e}"
    )
    assert d <= TOLERANCE
