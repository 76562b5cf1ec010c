"""Requests that the model cannot take are refused at the server's door."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.tokenizer_manager import TokenizerManager

from .ledger import Seam

host_validation = TokenizerManager._validate_one_request


def validate_request(manager: TokenizerManager, request: Any, input_ids: list[int] | None) -> None:
    """The host's check of a request, then one of its own: every token id is in the vocabulary.

    The host lets other ids through, and the first lookup of one ends the scheduler for everybody.
    Raises ValueError, which the host answers with status 400.
    """
    host_validation(manager, request, input_ids)
    vocab_size = manager.model_config.vocab_size
    outside = next((token for token in input_ids or () if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(
            f"token id {outside} is outside the model's vocabulary; valid ids are 0 to"
            f" {vocab_size - 1}"
        )


DOOR = Seam(
    target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
    why="a token id outside the vocabulary is refused, not looked up: that would end the scheduler",
    remove="the host checks the ids of a request",
    test="tests/host/test_serving.py",
    value=validate_request,
    take=lambda value: setattr(TokenizerManager, "_validate_one_request", value),
    found=lambda: [TokenizerManager._validate_one_request],
)
"""Taken in the process that requests come in at; its module is loaded in no other."""
