from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refluence.report.concentration import concentration


def test_by_hand() -> None:
    c = concentration([1.0, -4.0, 2.0, 0.0, -1.0], k=2)
    assert c.share == pytest.approx(6 / 8)
    assert (c.n, c.k, c.half, c.word) == (5, 2, 1, "Concentrated")
    assert c.reading.replace("\N{NO-BREAK SPACE}", " ") == (
        "The 2 strongest examples hold 75 % of the total influence; half of it lies in 1 of 5."
    )
    assert c.curve[0] == (0.0, 0.0)
    assert dict(c.curve)[0.2] == pytest.approx(0.5)
    assert c.curve[-1] == (1.0, 1.0)
    assert c.path().startswith("M0.0 40.0L20.0 20.0L")


def test_even_influence_is_diffuse() -> None:
    c = concentration(np.ones(100), k=8)
    assert (c.share, c.half, c.word) == (pytest.approx(0.08), 50, "Diffuse")


def test_no_influence_at_all() -> None:
    c = concentration(np.zeros(4), k=8)
    assert (c.k, c.share, c.half, c.word) == (4, 0.0, 0, "None")
    assert "No training example" in c.reading


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 70))
def test_shares_are_shares(scores: list[float], k: int) -> None:
    c = concentration(scores, k)
    heights = [y for _, y in c.curve]
    assert 0 <= c.share <= 1 + 1e-9
    assert heights == sorted(heights)
    assert c.half <= c.n
