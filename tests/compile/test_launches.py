"""How many launches a decode layer is, and that docs/performance.md says so."""

from __future__ import annotations

from pathlib import Path

import launches
import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- launches -->\n", "\n<!-- end of launches -->"


@pytest.fixture(scope="module")
def tables():
    return launches.table()


@pytest.mark.parametrize(("ratio", "limit"), [(4, 20), (128, 15)])
def test_launches_of_a_layer(tables, ratio, limit):
    """Everything but experts, in operators alone: no torch operation between them."""
    without_experts, _ = launches.totals(tables[ratio])
    assert without_experts <= limit
    assert not [name for name in tables[ratio] if name.startswith(launches.TORCH)]


def test_the_document_has_the_table(tables):
    text = DOCUMENT.read_text(encoding="utf-8")
    found = text.split(BEGIN)[1].split(END)[0]
    assert found == launches.markdown(tables), "PYTHONPATH=. python tests/compile/launches.py"
