"""A checkpoint with a DSpark draft behind the stock server."""

from __future__ import annotations

import pytest
from live_server import output_ids, serving

PROMPT = [5 + index * 7 % 250 for index in range(300)]


@pytest.fixture(scope="module")
def server(dspark_dir, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(dspark_dir, log, DSV4_PRECISION="exact") as running:
        yield running


def test_served_without_the_draft_and_says_so(server, dspark_dir):
    from dsv4_plugin.checkpoint.load import load_checkpoint
    from dsv4_plugin.config import Geometry, Precision
    from dsv4_plugin.model import DeepseekV4
    from dsv4_plugin.runtime import Engine

    model = DeepseekV4(Geometry.from_dir(dspark_dir), Precision.EXACT, parts="backbone")
    load_checkpoint(model, dspark_dir)
    (expected,) = Engine(model).generate([PROMPT], 12)
    assert output_ids(server.generate(PROMPT, 12, logprob_start=-1)) == expected
    said = [line for line in server.log.read_text().splitlines() if "DSpark" in line]
    assert len(said) == 1 and "3 stages, 5 tokens a step) is not loaded" in said[0]
