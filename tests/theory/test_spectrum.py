"""Effective dimension of a spectrum, and the damping for a wanted one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.errors import RefluenceError
from refluence.theory import SpectralMeasure, damping_for, effective_dimension, numerical_rank, stable_rank

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


@few
@given(values=spectra, scale=positive, damping=positive)
def test_the_stable_rank_lies_between_one_and_the_rank_and_bounds_the_dimension(values, scale, damping):
    found = stable_rank(values)
    assert 1 <= found <= len(values) * (1 + 1e-12)
    assert found == pytest.approx(sum(values) / max(values), rel=1e-12)
    assert stable_rank([scale * value for value in values]) == pytest.approx(found, rel=1e-9)
    assert effective_dimension(values, damping) <= found * max(values) / damping * (1 + 1e-12)
    assert stable_rank([0.0, 0.0]) == 0


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, math.nan], [1.0, math.inf]])
def test_a_spectrum_is_a_vector_of_finite_numbers(values):
    with pytest.raises(RefluenceError, match="vector of finite numbers"):
        effective_dimension(torch.tensor(values), 0.1)


def test_negative_eigenvalues_and_dampings_are_refused_with_their_value():
    with pytest.raises(RefluenceError, match=r"smallest eigenvalue is -0\.5"):
        effective_dimension([1.0, -0.5], 0.1)
    with pytest.raises(RefluenceError, match=r"damping must be ≥ 0, not -0\.1"):
        effective_dimension([1.0], -0.1)


counted = st.lists(st.tuples(positive, st.integers(1, 5)), min_size=1, max_size=12)


@few
@given(pairs=counted, damping=positive)
def test_multiplicities_count_as_so_many_eigenvalues(pairs, damping):
    values, counts = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    repeated = np.repeat(values, counts.astype(int))
    once, measure = SpectralMeasure(repeated), SpectralMeasure(values, counts)
    assert measure.trace == pytest.approx(once.trace, rel=1e-12)
    expected = effective_dimension(repeated, damping)
    assert effective_dimension(measure.values, damping, measure.counts) == pytest.approx(expected, rel=1e-12)
    assert effective_dimension(once.values, damping, once.counts) == pytest.approx(expected, rel=1e-12)


@few
@given(
    pairs=st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 5)), min_size=2, max_size=12),
    share=st.floats(0.01, 0.9),
)
def test_the_damping_for_a_dimension_counts_multiplicities(pairs, share):
    values, counts = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    dimension = share * counts.sum()
    damping = damping_for(values, dimension, counts)
    assert damping == pytest.approx(damping_for(np.repeat(values, counts.astype(int)), dimension), rel=1e-8)


def test_multiplicities_may_be_the_weights_of_a_quadrature():
    assert effective_dimension([2.0, 0.0], 1.0, [1.5, 30.0]) == pytest.approx(1.0)
    assert damping_for([2.0], 1.0, [1.5]) == pytest.approx(1.0)
    with pytest.raises(RefluenceError, match=r"between 0 and the rank, 1\.5"):
        damping_for([2.0], 1.6, [1.5])


def test_the_positive_part_of_a_measure_keeps_all_but_the_negative_eigenvalues():
    measure = SpectralMeasure(np.array([-2.0, 1.0, 3.0]), np.array([4.0, 1.0, 2.0]), sketch_size=7)
    part = measure.positive_part()
    assert measure.trace == -1.0
    assert part.trace == 7.0
    assert part.values.tolist() == [0.0, 1.0, 3.0]
    assert (part.counts == measure.counts).all()
    assert part.sketch_size == 7
    assert effective_dimension(part.values, 1.0, part.counts) == pytest.approx(0.5 + 2 * 0.75)


def test_the_public_names_are_those_of_the_module():
    assert rf.theory.effective_dimension is effective_dimension
    assert rf.theory.damping_for is damping_for
