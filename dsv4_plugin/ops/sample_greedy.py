"""Greedy choice of the next token."""

from __future__ import annotations

from torch import Tensor

from .operator import operator


@operator
def sample_greedy(logits: Tensor) -> Tensor:
    """int64 [T]: the lowest token id among the largest `logits` [T, vocab]."""
    return logits.argmax(-1)
