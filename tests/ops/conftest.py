"""Fixtures of the operators' tests."""

from __future__ import annotations

import pytest

from dsv4_plugin.ops.operator import HERE


@pytest.fixture(params=["any shapes", "static shapes"])
def each_form(request, monkeypatch):
    """Both forms of a reference: as a prefill may run it, and as a captured step must."""
    monkeypatch.setattr(HERE, "static", request.param == "static shapes")
