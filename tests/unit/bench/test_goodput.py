"""Requests that keep a service level, counted by hand."""

from __future__ import annotations

import pytest

from dsv4_plugin.bench.goodput import goodput, spelled


def test_each_request_is_judged_by_itself():
    """Four requests in two seconds: quick; slow to start; slow to go on; quick enough for the
    looser level alone. Means would hide the second and third behind the first."""
    ttfts = [0.5, 2.5, 1.0, 1.8]
    itls = [[0.010] * 9, [0.001] * 9, [0.2] * 9, [0.02, 0.10]]
    assert goodput(ttfts, itls, duration=2.0) == {"server": 1.0, "interactive": 0.5}


def test_a_bound_is_kept_by_its_own_value():
    assert goodput([1.5], [[0.015]], 1.0) == {"server": 1.0, "interactive": 1.0}


def test_an_answer_of_one_token_has_no_time_per_token():
    assert goodput([0.1], [[]], 1.0) == {"server": 1.0, "interactive": 1.0}


def test_requests_without_their_gaps_are_an_error():
    with pytest.raises(ValueError):
        goodput([0.1, 0.2], [[0.01]], 1.0)


def test_words():
    assert spelled({"server": 1.2, "interactive": 0.0}) == (
        "goodput server 1.20, interactive 0.00 requests/s"
    )
