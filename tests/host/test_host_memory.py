"""Pages that left the pool for the host's memory come back as they were."""

from __future__ import annotations

import random

import pytest
from one_scheduler import Schedulers

from dsv4_plugin.host.launch import LaunchError, check_words
from dsv4_plugin.host.options import CPU_HOST_MEMORY

PROMPTS, PAGES = 5, 2
POOL = ("--max-total-tokens", "2560", "--swa-full-tokens-ratio", "0.5")
"""Ten pages, of which each prompt fills two and begins a third: the five do not fit."""
TIER = ("--enable-hierarchical-cache", "--hicache-ratio", "4")
COPIES = tuple(word for pair in CPU_HOST_MEMORY.items() for word in pair)


@pytest.fixture(scope="module")
def schedulers():
    process = Schedulers()
    yield process
    process.close()


@pytest.fixture(scope="module")
def prompts(golden_geometry):
    draw = random.Random(3)
    return [
        [draw.randrange(4, golden_geometry.vocab_size) for _ in range(PAGES * 256 + 88)]
        for _ in range(PROMPTS)
    ]


@pytest.mark.thorough
def test_logits_after_a_hit_in_host_memory_are_those_of_a_hit_in_the_pool(
    schedulers, prompts, golden_dir
):
    twice = [*prompts, *prompts]
    options = {"new_tokens": [3] * len(twice), "one_by_one": True}
    found = schedulers.run(golden_dir, twice, *POOL, *TIER, *COPIES, **options)
    # The same prompts, met again while they are still in a pool that is large enough.
    large = ("--max-total-tokens", "8192", "--swa-full-tokens-ratio", "1")
    expected = schedulers.run(golden_dir, twice, *large, **options)
    assert expected["cached"][PROMPTS:] == [PAGES * 256] * PROMPTS
    assert found["cached"] == expected["cached"]
    assert sum(found["cached_in_host"]) >= 2 * PAGES * 256 and not sum(expected["cached_in_host"])
    assert found["tokens"] == expected["tokens"]
    # Bit for bit: the same operators on the same bytes.
    assert found["digests"] == expected["digests"]


@pytest.mark.parametrize("precision", ["exact", "official"])
def test_caches_beside_the_pool_have_no_second_tier(precision, golden_dir, monkeypatch):
    check_words(str(golden_dir), TIER)
    monkeypatch.setenv("DSV4_PRECISION", precision)
    with pytest.raises(LaunchError, match="--enable-hierarchical-cache cannot be served.*exact"):
        check_words(str(golden_dir), TIER)


def test_what_was_never_run_together_is_refused(golden_dir):
    with pytest.raises(LaunchError, match="never run together"):
        check_words(str(golden_dir), [*TIER, "--disaggregation-mode", "decode"])
