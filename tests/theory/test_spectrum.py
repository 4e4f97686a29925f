"""Effective dimension of a spectrum, and the damping for a wanted one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.errors import RefluenceError
from refluence.theory import damping_for, effective_dimension, numerical_rank

positive = st.floats(1e-6, 1e4)
spectra = st.lists(positive, min_size=1, max_size=30)
few = settings(max_examples=60, deadline=None, derandomize=True)


def test_the_effective_dimension_is_the_sum_of_shrinkages():
    assert effective_dimension([3.0, 1.0, 0.5], 0.5) == pytest.approx(3 / 3.5 + 1 / 1.5 + 0.5)
    assert effective_dimension(torch.tensor([3.0, 1.0, 0.0]), 0.0) == 2
    assert effective_dimension(np.array([0.0, 0.0]), 1.0) == 0


def test_it_is_the_trace_of_the_curvature_times_its_damped_inverse():
    A = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    C = A.T @ A
    expected = torch.linalg.solve(C + 0.3 * torch.eye(9, dtype=torch.float64), C).trace()
    assert effective_dimension(torch.linalg.eigvalsh(C), 0.3) == pytest.approx(float(expected), rel=1e-12)


@few
@given(values=spectra, damping=positive, factor=st.floats(1.01, 100))
def test_it_falls_with_the_damping_and_never_exceeds_the_rank(values, damping, factor):
    assert effective_dimension(values, damping * factor) < effective_dimension(values, damping) < len(values)


@few
@given(a=spectra, b=spectra, damping=positive, scale=positive)
def test_it_is_additive_over_blocks_and_has_no_units(a, b, damping, scale):
    both = effective_dimension([*a, *b], damping)
    assert both == pytest.approx(effective_dimension(a, damping) + effective_dimension(b, damping), rel=1e-12)
    scaled = effective_dimension([scale * value for value in a], scale * damping)
    assert scaled == pytest.approx(effective_dimension(a, damping), rel=1e-9)


@few
@given(values=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30), share=st.floats(0.01, 0.95))
def test_the_damping_for_a_dimension_gives_that_dimension(values, share):
    dimension = share * len(values)
    assert effective_dimension(values, damping_for(values, dimension)) == pytest.approx(dimension, rel=1e-9)


def test_zeros_do_not_change_the_damping_for_a_dimension():
    values = [5.0, 1.0, 0.2, 0.01]
    assert damping_for([*values, 0.0, 0.0, -1e-18], 2.5) == pytest.approx(damping_for(values, 2.5), rel=1e-12)


@pytest.mark.parametrize("dimension", [0.0, -1.0, 3.0, 7.0, math.nan])
def test_a_dimension_that_no_damping_gives_is_refused_with_the_rank(dimension):
    with pytest.raises(RefluenceError, match="between 0 and the rank, 3"):
        damping_for([5.0, 1.0, 0.2, 0.0], dimension)


def test_the_numerical_rank_counts_what_exceeds_rounding():
    assert numerical_rank([1.0, 1e-3, 1e-17, 0.0]) == 2


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, math.nan], [1.0, math.inf]])
def test_a_spectrum_is_a_vector_of_finite_numbers(values):
    with pytest.raises(RefluenceError, match="vector of finite numbers"):
        effective_dimension(torch.tensor(values), 0.1)


def test_negative_eigenvalues_and_dampings_are_refused_with_their_value():
    with pytest.raises(RefluenceError, match=r"smallest eigenvalue is -0\.5"):
        effective_dimension([1.0, -0.5], 0.1)
    with pytest.raises(RefluenceError, match=r"damping must be ≥ 0, not -0\.1"):
        effective_dimension([1.0], -0.1)


def test_the_public_names_are_those_of_the_module():
    assert rf.theory.effective_dimension is effective_dimension
    assert rf.theory.damping_for is damping_for
