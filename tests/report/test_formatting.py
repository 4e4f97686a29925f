from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refluence.report.formatting import count, number, percent, shorten, signed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.03125, "0.0312"),
        (1797.0, "1,797"),
        (12.34, "12.3"),
        (-0.5, "−0.500"),
        (3.14e-5, "3.14×10⁻⁵"),
        (-2.5e7, "−2.50×10⁷"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "not a number"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_signed_and_count() -> None:
    assert (signed(0.0123), signed(-0.0123), signed(0.0)) == ("+0.012", "−0.012", "0")
    assert (count(1, "row"), count(1200, "row")) == ("1 row", "1,200 rows")


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (0.0004, "< 0.1 %"),
        (0.034, "3.4 %"),
        (0.5, "50 %"),
        (0.9963, "99.6 %"),
        (0.9999, "> 99.9 %"),
        (1.0, "100 %"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share).replace("\N{NO-BREAK SPACE}", " ") == text


@given(st.floats())
def test_number_is_short_whatever_the_value(value: float) -> None:
    assert 0 < len(number(value)) <= 12


@given(st.text(), st.integers(1, 40))
def test_shorten_keeps_the_limit(text: str, limit: int) -> None:
    assert len(shorten(text, limit)) <= limit


def test_shorten_disarms_what_would_reorder_the_line() -> None:
    assert shorten("safe\u202eexe.txt\x00\ud800", 40) == "safe exe.txt  "
    assert shorten("two\nlines", 40) == "two\nlines"
