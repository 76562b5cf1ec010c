"""The engine's own promises: pages, rows, greedy continuation."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.runtime import Engine
from dsv4_plugin.runtime.pool import Pages, PoolFull


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_generate_is_the_argmax_of_score(small_model):
    engine = Engine(small_model("exact"), page_seed=3)
    prompts = [tokens(5), tokens(130, 1), tokens(60, 2)]
    answers = engine.generate(prompts, 9, chunk=50)
    for prompt, answer in zip(prompts, answers):
        logits = engine.score(prompt + answer)
        assert len(answer) == 9
        for place, token in enumerate(answer):
            row = logits[len(prompt) - 1 + place]
            # The chosen token is the best but for what another order of fp32 sums moves.
            assert row[token] >= row.max() - 1e-4


def test_generate_in_a_batch_equals_alone(small_model):
    engine = Engine(small_model("exact"))
    prompts = [tokens(7), tokens(140, 1)]
    assert engine.generate(prompts, 8) == [engine.generate([prompt], 8)[0] for prompt in prompts]


def test_pages_come_back(small_model):
    engine = Engine(small_model("exact"), max_tokens=512, max_requests=2)
    for seed in range(8):  # more than the pool holds at once
        assert engine.score(tokens(300, seed)).isfinite().all()


def test_full_pool_takes_nothing(small_model):
    engine = Engine(small_model("exact"), max_tokens=256, max_requests=2)  # three pages
    first, second = engine.open(), engine.open()
    engine.forward([(first, tokens(200))])
    with pytest.raises(PoolFull, match="3 pages wanted, 2 are free"):
        engine.forward([(first, tokens(100)), (second, tokens(300))])
    assert (first.length, second.length, len(first.pages), len(second.pages)) == (200, 0, 1, 0)
    engine.forward([(first, tokens(100)), (second, tokens(200))])
    with pytest.raises(PoolFull, match="request rows"):
        engine.open()


def test_failed_score_gives_its_pages_back(small_model):
    engine = Engine(small_model("exact"), max_tokens=256, max_requests=2)
    for _ in range(3):
        with pytest.raises(PoolFull):
            engine.score(tokens(1000), [200] * 5)
    assert engine.score(tokens(700)).shape == (700, 320)


def test_page_zero_belongs_to_nobody():
    assert sorted(Pages(9).take(8)) == sorted(Pages(9, seed=5).take(8)) == list(range(1, 9))
    assert Pages(9, seed=5).take(8) == Pages(9, seed=5).take(8) != Pages(9, seed=6).take(8)


@pytest.mark.parametrize("precision", ["exact", "official", "serving"])
def test_no_rows_in_any_precision(golden_model, precision):
    engine = Engine(golden_model(precision), max_tokens=256, max_requests=1)
    sequence = engine.open()
    assert engine.forward([]).shape == engine.forward([(sequence, [])]).shape == (0, 4, 128)
    engine.close(sequence)
    assert engine.score([]).shape == engine.score_draft([]).shape == (0, 512)
