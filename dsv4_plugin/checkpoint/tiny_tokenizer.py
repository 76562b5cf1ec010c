"""A byte-level tokenizer with DeepSeek-V4's special tokens, for tiny checkpoints (docs/model.md §7)."""

from __future__ import annotations

import json
from pathlib import Path

_LEADING = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
_MARKERS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜latest_reminder｜>", "｜DSML｜",
            "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜read_url｜>",
            "<｜deepseek_image｜>")
# Marked special, these are dropped from decoded text; the parsers of reasoning and tool calls must see them.
_VISIBLE = ("<think>", "</think>", "｜DSML｜")

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = _LEADING
FIRST_BYTE = len(_LEADING)
VOCAB_SIZE = 320
"""Rounded up to a multiple of 64 with placeholders, as the released tokenizer fills its table."""


def byte_id(byte: int) -> int:
    """The token id of one byte."""
    return FIRST_BYTE + byte


def special_tokens() -> dict[str, int]:
    """Every token that is not a byte, with its id: the leading three, markers, placeholders."""
    fixed = {token: index for index, token in enumerate(_LEADING)}
    start = FIRST_BYTE + 256
    fixed.update({token: start + index for index, token in enumerate(_MARKERS)})
    start += len(_MARKERS)
    fixed.update({f"<｜place▁holder▁no▁{index}｜>": start + index for index in range(VOCAB_SIZE - start)})
    return fixed


def write_tokenizer(directory: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `directory`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: byte_id(byte) for byte, letter in enumerate(_byte_letters())}
    vocabulary |= special_tokens()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=token not in _VISIBLE)
                          for token in special_tokens()])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN,
                "pad_token": PAD_TOKEN, "unk_token": None, "add_bos_token": False, "add_eos_token": False,
                "clean_up_tokenization_spaces": False, "model_max_length": max_length}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _byte_letters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
