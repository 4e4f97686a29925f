"""The square of measured against predicted."""

import math

from hypothesis import given
from hypothesis import strategies as st

from refluence.report.scatter import TICKS, round_values, scatter

values = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-6)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=20))
def test_both_axes_have_one_scale_that_holds_every_point_and_zero(points):
    drawn = scatter([(x, y, "", 0) for x, y in points])
    places = [place for dot in drawn.dots for place in (dot.x, dot.y)]
    assert all(0 <= place <= 100 for place in [*places, drawn.zero])
    for dot, (x, y) in zip(drawn.dots, points, strict=True):
        assert math.isclose(dot.x, dot.y, abs_tol=1e-6) or x != y
        assert (dot.x > dot.y) == (x > y) or math.isclose(dot.x, dot.y, rel_tol=1e-9)


@given(values, st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within(low, width):
    high = low + width
    if high <= low:
        return
    ticks = round_values(low, high)
    assert 1 <= len(ticks) <= TICKS
    assert all(low - 1e-6 * width <= tick <= high + 1e-6 * width for tick in ticks)


def test_ticks_are_round():
    assert round_values(-0.031, 0.052) == [-0.02, 0.0, 0.02, 0.04]
    assert round_values(0, 10) == [0.0, 5.0, 10.0]


def test_what_is_not_finite_is_left_out():
    drawn = scatter([(1.0, math.nan, "lost", 0), (1.0, 2.0, "kept", 1)])
    assert [dot.title for dot in drawn.dots] == ["kept"]
    assert scatter([(math.inf, 0.0, "", 0)]) is None
