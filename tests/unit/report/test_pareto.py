"""The frontier and Steffen's interpolation along it."""

import numpy as np
import pytest
import scipy.interpolate  # noqa: F401  loaded before hypothesis times the first example
from hypothesis import given
from hypothesis import strategies as st

from dsv4_plugin.report.pareto import Frontier, monotone_cubic

falling = st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=2, max_size=9).map(
    lambda steps: (
        np.cumsum([dx for dx, _ in steps]),
        np.cumsum([dy for _, dy in steps])[::-1].copy(),
    )
)


@given(falling, st.floats(0, 1))
def test_never_leaves_the_range_of_its_two_knots(knots, position):
    x, y = knots
    at = x[0] + position * (x[-1] - x[0])
    index = min(max(int(np.searchsorted(x, at)) - 1, 0), len(x) - 2)
    value = monotone_cubic(x, y, np.array([at]))[0]
    rounding = 1e-9 * y[0]  # a cubic of fp64 values up to y[0]
    assert y[index + 1] - rounding <= value <= y[index] + rounding


@given(falling)
def test_goes_through_its_knots_and_falls(knots):
    x, y = knots
    assert monotone_cubic(x, y, x) == pytest.approx(y, rel=1e-9, abs=1e-9 * y[0])
    dense = monotone_cubic(x, y, np.linspace(x[0], x[-1], 200))
    assert np.all(np.diff(dense) <= 1e-9 * y[0])


@given(falling.map(lambda knots: knots[0]), st.floats(-3, 3), st.floats(-10, 10))
def test_a_line_stays_a_line(x, slope, intercept):
    at = np.linspace(x[0], x[-1], 17)
    # fp64 rounding of sums of up to |slope| x[-1] + |intercept|
    scale = abs(slope) * x[-1] + abs(intercept) + 1
    assert monotone_cubic(x, slope * x + intercept, at) == pytest.approx(
        slope * at + intercept, abs=1e-9 * scale
    )


def test_inner_slope_follows_steffens_rule():
    """Knots (0, 0), (1, 1), (3, 2): secants 1 and 1/2; the parabola's slope at 1 is (1·2 + 0.5·1)/3
    = 5/6, below 2·0.5, so it holds.

    Evaluated by hand on [1, 3], whose right slope is (3·0.5 - 5/6)/2 = 1/3: Hermite at the middle
    is the mean of the values plus (left slope - right slope)·width/8 = 1.5 + (5/6 - 1/3)·2/8 =
    1.625.
    """
    x, y = np.array([0.0, 1.0, 3.0]), np.array([0.0, 1.0, 2.0])
    assert monotone_cubic(x, y, np.array([2.0]))[0] == pytest.approx(1.625, rel=1e-12)


def test_a_change_of_direction_is_flat_at_its_knot():
    x, y = np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 0.0])
    around = monotone_cubic(x, y, np.array([0.999999, 1.000001]))
    assert np.all(around <= 1) and around == pytest.approx(1, abs=1e-9)


def test_frontier_keeps_what_nothing_beats():
    frontier = Frontier.of([5.59, 9.37, 13.76, 9.0, 13.76], [1814, 2256, 1556, 2256, 1500])
    assert frontier.intvty.tolist() == [9.37, 13.76]
    assert frontier.tput.tolist() == [2256, 1556]
    assert frontier.holds(9.37, 2256) and not frontier.holds(5.59, 1814)


def test_outside_the_range_is_unreachable():
    frontier = Frontier.of([10, 20], [100, 50])
    assert frontier.at(9.99) is None and frontier.at(20.01) is None
    assert frontier.at(10) == 100 and frontier.at(20) == 50
    assert Frontier.of([10], [100]).at(10) == 100


def test_no_point_is_an_error():
    with pytest.raises(ValueError, match="at least one point"):
        Frontier.of([], [])
