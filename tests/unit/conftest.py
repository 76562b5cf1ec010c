"""Result files for the report's tests."""

import json

import pytest


@pytest.fixture(scope="session")
def result():
    """Makes one result in InferenceX's shape; keyword arguments replace fields."""

    def make(conc=8, **changes):
        made = {
            "hw": "mi355x",
            "conc": conc,
            "model": "deepseek-ai/DeepSeek-V4-Pro",
            "framework": "sglang",
            "precision": "fp4",
            "spec_decoding": "none",
            "isl": 8192,
            "osl": 1024,
            "tp": 8,
            "ep": 1,
            "dp_attention": "false",
            "date": "2026-09-01",
            "tput_per_gpu": 400.0 + conc,
            "output_tput_per_gpu": 44.0,
            "input_tput_per_gpu": 356.0 + conc,
            "median_intvty": 100 / conc,
            "median_tpot": conc / 100,
        }
        return {**made, **changes}

    return make


@pytest.fixture(scope="session")
def write():
    """Writes a document as JSON and returns the path."""

    def to(path, document):
        path.write_text(json.dumps(document))
        return path

    return to
