"""Sizes of the released models, by name: config.json as released."""

from __future__ import annotations

import json
from pathlib import Path

from ..config import ConfigError, Geometry

MODELS = Path(__file__).with_name("models")


def load_geometry(model: str) -> Geometry:
    """Geometry of a released model ("pro-0813"), a config.json or a directory that holds one.
    Raises ConfigError."""
    released = MODELS / f"{model.lower()}.json"
    path = Path(model)
    if released.is_file() and "/" not in model:
        path = released
    elif path.is_dir():
        return Geometry.from_dir(path)
    if not path.is_file():
        raise ConfigError(
            f"model {model!r} is neither"
            f" {' nor '.join(sorted(p.stem for p in MODELS.glob('*.json')))} nor the path of a"
            " config.json"
        )
    try:
        return Geometry.from_config(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
