"""Errors over all pairs, and what curves are read off as."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refluence.studies.projection.errors import ErrorMeter, Normalisers, interpolated, log_slope, statistics
from refluence.studies.projection.gaussian import GramGaussian

DAMPINGS = (1e-3, 1e-1)


@pytest.fixture(scope="module")
def systems(spectral):
    return {s.size: s for s in GramGaussian(spectral).systems(3, [8, 32, 128, 2048], {8, 32, 128, 2048})}


def dense_errors(spectral, system, damping, mu, kind):
    """|τ̃_μ − τ_λ| ÷ both sides' √τ_0 or √gap, by explicit inverses and loops over the definition."""
    left = torch.eye(len(system.curvature), dtype=torch.float64) if system.left is None else system.left
    inner = system.curvature + mu * torch.eye(len(system.curvature), dtype=torch.float64)
    difference = (left @ torch.linalg.inv(inner) @ system.right - spectral.scores(damping)).abs()
    train, tests = spectral.tau_0() if kind == "eps" else spectral.gap(damping)
    return (difference / torch.outer(train.sqrt(), tests.sqrt())).numpy()


@pytest.mark.parametrize("size", [8, 128])
def test_statistics_are_those_of_all_pairs(spectral, systems, size):
    meter = ErrorMeter(spectral, DAMPINGS)
    measured = meter.measure(systems[size])
    assert meter.names[:5] == ("eps_mean", "eps_max", "eps_95", "eps_99", "gap_mean")
    for row, damping in enumerate(DAMPINGS):
        mu = damping * (1 - spectral.dimension(damping) / size)
        for part, shift in (("plain", damping), ("corrected", mu)):
            found = measured[part][row].numpy()
            if shift <= 0:
                assert np.isnan(found).all()
                continue
            for place, kind in enumerate(("eps", "gap")):
                errors = dense_errors(spectral, systems[size], damping, shift, kind)
                expected = [errors.mean(), errors.max(), *np.quantile(errors, [0.95, 0.99])]
                np.testing.assert_allclose(found[4 * place : 4 * place + 4], expected, rtol=1e-6)


def test_self_influence_compares_the_diagonal(spectral):
    own = spectral.of_train(10)
    (system,) = GramGaussian(own).systems(1, [40], {40})
    measured = ErrorMeter(own, DAMPINGS, diagonal=True).measure(system)["plain"].numpy()
    for row, damping in enumerate(DAMPINGS):
        exact = own.scores(damping)[:10].diagonal()
        inner = torch.linalg.inv(system.curvature + damping * torch.eye(40, dtype=torch.float64))
        difference = ((system.left[:10] @ inner @ system.right).diagonal() - exact).abs()
        train, _ = own.tau_0()
        np.testing.assert_allclose(measured[row, 1], (difference / train[:10]).max(), rtol=1e-6)
        np.testing.assert_allclose(measured[row, 9], (difference / exact).max(), rtol=1e-6)


def test_the_plateau_is_the_error_of_a_tiny_sketch(spectral, systems):
    meter = ErrorMeter(spectral, (1e-5,))
    (tiny,) = GramGaussian(spectral).systems(0, [1], {1})
    plateau = meter.without_sketch()[0, 2]
    assert float(meter.measure(tiny)["plain"][0, 2] / plateau) == pytest.approx(1, abs=0.1)
    exact = spectral.scores(1e-5).abs()
    train, tests = spectral.tau_0()
    assert float(plateau) == pytest.approx(float((exact / torch.outer(train, tests).sqrt()).quantile(0.95)), rel=1e-9)


def test_the_correction_takes_the_bias_out(spectral):
    """Averages over sketches converge to the exact scores with it, and do not without."""
    damping, size, draws = 0.1, 32, 200
    plain, corrected = 0, 0
    mu = ErrorMeter(spectral, (damping,)).corrected_dampings(size)[0]
    for seed in range(draws):
        (system,) = GramGaussian(spectral).systems(seed, [size], {size})
        one, other = system.scores([damping, mu])
        plain, corrected = plain + one / draws, corrected + other / draws
    exact = spectral.scores(damping)
    assert float((corrected - exact).norm() / exact.norm()) < 0.4 * float((plain - exact).norm() / exact.norm())


def test_pairs_without_a_normaliser_are_left_out(spectral):
    """A test gradient of zero has no direction, and no error."""
    tests = spectral.tests.clone()
    tests[3] = 0
    rules = Normalisers(type(spectral)(spectral.eigenvalues, spectral.basis, tests, spectral.outside), 0.1)
    exact = torch.ones(60, 12, dtype=torch.float64)
    for _, errors in rules.errors(exact * 2, exact):
        assert errors.shape == (60 * 11,)
        assert bool(torch.isfinite(errors).all())


def test_statistics_of_nothing_are_not_a_number():
    assert np.isnan(statistics(torch.zeros(0, dtype=torch.float64))).all()


@given(st.floats(-2, 2), st.floats(0.1, 10), st.integers(4, 9))
def test_slopes_and_places_of_a_power_law(slope, scale, points):
    x = np.geomspace(1, 1000, points)
    y = scale * x**slope
    assert log_slope(x, y, 5) == pytest.approx(slope, abs=1e-9)
    assert interpolated(x, y, 20.0) == pytest.approx(scale * 20**slope, rel=1e-9)
    assert np.isnan(interpolated(x, y, 2000.0))
    assert np.isnan(log_slope(x, y, 900.0))
