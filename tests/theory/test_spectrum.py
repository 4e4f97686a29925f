"""Effective dimension and the damping that gives one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import RefluenceError
from refluence.theory import damping_for, effective_dimension, numerical_rank

spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)


def test_effective_dimension_by_hand():
    assert effective_dimension([3.0, 1.0, 0.0], 1.0) == pytest.approx(0.75 + 0.5)
    assert effective_dimension(torch.tensor([3.0, 1.0, 0.0]), 0.0) == 2
    assert effective_dimension(np.array([1e-3]), 1e9) == pytest.approx(1e-12)


@given(values=spectra, damping=st.floats(1e-9, 1e9), factor=st.floats(1.001, 100))
def test_it_falls_with_damping_and_keeps_between_zero_and_the_rank(values, damping, factor):
    first, second = effective_dimension(values, damping), effective_dimension(values, damping * factor)
    assert 0 < second <= first <= len(values)
    assert second < first or first == pytest.approx(len(values), rel=1e-9)


@given(values=spectra, damping=st.floats(1e-6, 1e6), scale=st.floats(1e-6, 1e6))
def test_it_depends_on_ratios_only(values, damping, scale):
    scaled = effective_dimension([scale * value for value in values], scale * damping)
    assert scaled == pytest.approx(effective_dimension(values, damping), rel=1e-9)


@settings(deadline=None)
@given(values=spectra, share=st.floats(0.001, 0.999))
def test_damping_for_a_dimension_gives_that_dimension(values, share):
    wanted = share * numerical_rank(values)
    assert effective_dimension(values, damping_for(values, wanted)) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("dimension", [0, -1, 2, 2.5])
def test_a_dimension_that_no_damping_gives_is_refused(dimension):
    with pytest.raises(RefluenceError, match="between 0 and the rank, 2"):
        damping_for([1.0, 2.0, 0.0], dimension)


@pytest.mark.parametrize("values", [[], np.ones((1, 1)), [np.nan], [1.0, -0.1]])
def test_what_is_no_spectrum_is_refused(values):
    with pytest.raises(RefluenceError):
        effective_dimension(values, 1.0)


def test_a_negative_damping_is_refused():
    with pytest.raises(RefluenceError, match="-1"):
        effective_dimension([1.0], -1)
