"""Fixtures for the tests of the host floor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# for `live_server`: pytest's importlib mode adds no directory
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def schedulers():
    """A process that has imported the host once and forks a scheduler for each job."""
    from one_scheduler import Schedulers

    running = Schedulers()
    yield running
    running.close()


@pytest.fixture(scope="session")
def golden_sequences(golden):
    """(token ids, positions, log-softmax of the exact logits at them) of each golden sequence."""
    import torch

    return [
        (
            golden[f"input_ids_{k}"].tolist(),
            golden[f"positions_{k}"],
            torch.log_softmax(golden[f"logits_{k}"].double(), -1),
        )
        for k in range(3)
    ]
