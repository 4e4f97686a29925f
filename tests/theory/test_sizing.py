"""How many rows a sketch needs, and that they are enough."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import RefluenceError
from refluence.theory import (
    achieved_epsilon,
    damping_for,
    effective_dimension,
    implied_damping,
    range_error,
    sketch_size,
)

few = settings(max_examples=100, deadline=None, derandomize=True)
dimensions, epsilons, deltas = st.floats(0.5, 1e4), st.floats(0.01, 0.95), st.floats(1e-6, 0.5)


@few
@given(d=dimensions, epsilon=epsilons, delta=deltas)
def test_the_size_is_the_least_that_achieves_epsilon(d, epsilon, delta):
    m = sketch_size(d, epsilon, delta)
    assert achieved_epsilon(m, d, delta) <= epsilon * (1 + 1e-9)
    assert m == 1 or achieved_epsilon(m - 1, d, delta) > epsilon * (1 - 1e-9)


@few
@given(d=dimensions, epsilon=epsilons, delta=deltas, factor=st.floats(1.05, 3))
def test_more_is_needed_for_less_error_more_certainty_and_more_dimensions(d, epsilon, delta, factor):
    m = sketch_size(d, epsilon, delta)
    assert m > d
    assert sketch_size(d, epsilon / factor, delta) >= m
    assert sketch_size(d, epsilon, delta / factor) >= m
    assert sketch_size(d * factor, epsilon, delta) >= m
    assert 0 < achieved_epsilon(m + 1, d, delta) <= achieved_epsilon(m, d, delta) <= 1


def test_the_formula_by_hand():
    assert sketch_size(100.0, 0.1, math.exp(-4)) == 6630
    assert sketch_size(100.0, 0.95, 0.5) == math.ceil(100 * 1.95**2 / 3.8)  # the bias needs more than the fluctuation
    assert achieved_epsilon(6630, 100.0, math.exp(-4)) == pytest.approx(0.1)
    assert achieved_epsilon(5, 100.0) == 1.0


def test_the_second_form_is_the_largest_bias_of_a_sketch_without_fluctuation():
    values = torch.logspace(2, -6, 2000, dtype=torch.float64)
    for share in (0.2, 0.5, 0.9):
        kappa = 0.01
        d = effective_dimension(values, kappa)
        m = d / share
        damping = kappa * (1 - share)
        biases = values / (values + damping) - values / (values + kappa)
        epsilon = float(biases.max())
        assert m == pytest.approx(d * (1 + epsilon) ** 2 / (4 * epsilon), rel=1e-3)


@pytest.mark.parametrize(("decay", "epsilon"), [(1.0, 0.3), (2.0, 0.15), (4.0, 0.5)])
def test_sketches_of_that_size_are_good_for_epsilon(decay, epsilon):
    """Spectra as flat and as steep as real ones: at most δ of 40 sketches may be worse, and one by chance."""
    values = torch.arange(1, 151, dtype=torch.float64) ** -decay
    damping = damping_for(values, 12.0)
    m = sketch_size(12.0, epsilon, 0.05)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(40):
        P = torch.randn(m, 150, dtype=torch.float64, generator=generator) * values.sqrt() / m**0.5
        found.append(range_error(torch.diag(values), P.T @ P, damping))
    assert sum(error > epsilon for error in found) <= 3
    assert sorted(found)[20] > epsilon / 3  # nor far too many
    assert implied_damping(torch.linalg.eigvalsh(P @ P.T).clamp(min=0), m, damping) > damping


@pytest.mark.parametrize("epsilon", [0.0, 1.0, math.nan])
def test_an_epsilon_that_no_size_gives_is_refused(epsilon):
    with pytest.raises(RefluenceError, match="epsilon must lie between 0 and 1"):
        sketch_size(10.0, epsilon)


def test_what_makes_no_size_is_refused():
    with pytest.raises(RefluenceError, match=r"delta between 0 and 1, not 10\.0 and 0"):
        sketch_size(10.0, 0.1, 0)
    with pytest.raises(RefluenceError, match=r"must be finite, ≥ 0, .*not inf"):
        sketch_size(math.inf, 0.1)
    with pytest.raises(RefluenceError, match="at least 1 row, not 0"):
        achieved_epsilon(0, 10.0)
