"""A byte-level tokenizer with DeepSeek-V4's special tokens, for tiny checkpoints (docs/model.md
§7)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

_LEADING = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
_MARKERS = (
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "<｜latest_reminder｜>",
    "｜DSML｜",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜read_url｜>",
    "<｜deepseek_image｜>",
)
# Marked special, these are dropped from decoded text; the parsers of reasoning and tool calls must
# see them.
_VISIBLE = ("<think>", "</think>", "｜DSML｜")

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = _LEADING
FIRST_BYTE = len(_LEADING)
UNIT = 64
"""Vocabularies are filled up to a multiple of this with placeholders, as the released tokenizer
fills its table."""


def byte_id(byte: int) -> int:
    """The token id of one byte."""
    return FIRST_BYTE + byte


def vocabulary_size(learned: int = 0) -> int:
    """Rows of the embedding for a tokenizer with `learned` merges."""
    return -(-(FIRST_BYTE + 256 + learned + len(_MARKERS)) // UNIT) * UNIT


VOCAB_SIZE = vocabulary_size()


def special_tokens(learned: int = 0) -> dict[str, int]:
    """Every token that is neither a byte nor one of the `learned` merges, with its id: the leading
    three, markers, placeholders."""
    fixed = {token: index for index, token in enumerate(_LEADING)}
    start = FIRST_BYTE + 256 + learned
    fixed.update({token: start + index for index, token in enumerate(_MARKERS)})
    start += len(_MARKERS)
    fixed.update(
        {
            f"<｜place▁holder▁no▁{index}｜>": start + index
            for index in range(vocabulary_size(learned) - start)
        }
    )
    return fixed


def write_tokenizer(
    directory: Path, max_length: int, merges: Sequence[tuple[str, str]] = ()
) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `directory`; without `merges`
    (`learn_merges`) a token is a byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: byte_id(byte) for byte, letter in enumerate(_byte_letters())}
    vocabulary |= {
        left + right: FIRST_BYTE + 256 + index for index, (left, right) in enumerate(merges)
    }
    specials = special_tokens(len(merges))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | specials, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=bool(merges)
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=token not in _VISIBLE) for token in specials]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    )


def learn_merges(texts: Iterable[str], vocab_size: int) -> list[tuple[str, str]]:
    """Byte-pair merges of `texts` for a vocabulary of `vocab_size` rows in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned = vocab_size - FIRST_BYTE - 256 - len(_MARKERS)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=256 + learned, initial_alphabet=_byte_letters(), show_progress=False
        ),
    )
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _byte_letters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: itself where printable,
    else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
