"""The damping that a sketch adds of its own."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.errors import RefluenceError
from refluence.theory import (
    corrected_damping,
    effective_dimension,
    implied_damping,
    sketch_variance_scale,
    sketched_dimension,
)

spectra = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=20)


@settings(deadline=None)
@given(values=spectra, extra=st.integers(0, 40), damping=st.floats(1e-4, 1e4))
def test_the_two_directions_are_inverse(values, extra, damping):
    size = len(values) + extra
    target = implied_damping(values, size, damping)
    assert target > damping
    assert corrected_damping(values, size, target) == pytest.approx(damping, rel=1e-7)


@given(values=spectra, extra=st.integers(1, 40), damping=st.floats(1e-4, 1e4))
def test_the_two_forms_of_the_law_agree(values, extra, damping):
    padded = np.array([*values, *[0.0] * extra])
    target = implied_damping(values, padded.size, damping)
    assert 1 / target == pytest.approx((1 / (padded + damping)).mean(), rel=1e-9)
    dimension = effective_dimension(values, damping)
    assert damping == pytest.approx(target * (1 - dimension / padded.size), rel=1e-9)


def test_a_target_below_the_harmonic_mean_is_refused_with_a_size():
    with pytest.raises(RefluenceError, match=r"m = 2 .* Try m = 6"):
        corrected_damping([1.0, 3.0], 2, 1.4)
    assert corrected_damping([1.0, 3.0], 2, 1.6) > 0  # the harmonic mean is 1.5


def test_the_mean_of_corrected_scores_is_the_exact_one_and_of_uncorrected_is_not():
    """Averages over independent sketches against the exact form, in standard errors."""
    torch.manual_seed(0)
    d, size, kappa = 60, 40, 0.05
    spectrum = torch.logspace(0, -3, d, dtype=torch.float64)
    C = torch.diag(spectrum)
    v, g = spectrum.sqrt() * torch.randn(d).double(), spectrum.sqrt() * torch.randn(d).double()
    v = g + 0.3 * v
    exact = float(v @ torch.linalg.solve(C + kappa * torch.eye(d), g))

    # Stretches of d columns of wide sketches are independent sketches.
    sketches = [P for seed in range(5) for P in rf.sketches.Gaussian(size, seed=seed).matrix(60 * d).split(d, dim=1)]

    def sketched(P, corrected):
        M = P @ C @ P.T
        damping = corrected_damping(torch.linalg.eigvalsh(M), size, kappa) if corrected else kappa
        return float((P @ v) @ torch.linalg.solve(M + damping * torch.eye(size), P @ g))

    for corrected in (True, False):
        values = np.array([sketched(P, corrected) for P in sketches])
        deviation = abs(values.mean() - exact) / (values.std(ddof=1) / len(values) ** 0.5)
        assert (deviation < 4) if corrected else (deviation > 8)


def test_a_large_sketch_needs_hardly_any_correction():
    assert corrected_damping([1.0, 0.5, 0.1], 10**6, 0.01) == pytest.approx(0.01, rel=1e-5)


def test_a_target_at_or_below_the_harmonic_mean_is_refused_with_both_numbers():
    values = [2.0, 1.0, 0.5]
    harmonic = 3 / sum(1 / v for v in values)
    corrected_damping(values, 3, 1.001 * harmonic)
    for share in (1.0, 0.999, 0.1):
        with pytest.raises(RefluenceError, match=rf"m = 3 .*{share * harmonic:.3g}.*{harmonic:.3g}.*larger damping"):
            corrected_damping(values, 3, share * harmonic)


def test_any_positive_target_will_do_where_the_sketch_is_wider_than_the_rank():
    assert 0 < corrected_damping([2.0, 1.0], 3, 1e-6) < 1e-6


@pytest.mark.parametrize("call", [lambda: corrected_damping([1.0], 2, 0.0), lambda: implied_damping([1.0], 2, 0.0)])
def test_no_damping_cannot_be_corrected_for(call):
    with pytest.raises(RefluenceError, match=r"must be > 0.*, not 0"):
        call()


@pytest.mark.parametrize("call", [corrected_damping, implied_damping, sketched_dimension, sketch_variance_scale])
def test_a_sketched_spectrum_is_a_vector_of_finite_numbers_of_any_kind(call):
    expected = call([2.0, 1.0], 3, 0.5)
    for values in (torch.tensor([2.0, 1.0], requires_grad=True), torch.tensor([2, 1]), np.float32([2, 1]), (2, 1)):
        assert call(values, 3, 0.5) == expected
    for values in ([], [[1.0, 2.0]], [1.0, np.nan], [1.0, np.inf]):
        with pytest.raises(RefluenceError, match="vector of finite numbers"):
            call(torch.tensor(values), 3, 0.5)


def test_an_infinite_damping_cannot_be_estimated():
    with pytest.raises(RefluenceError, match="finite, not inf"):
        corrected_damping([1.0], 2, np.inf)


def test_the_dimension_of_a_sketch_keeps_its_digits_where_it_is_small():
    assert sketched_dimension([2.0, 1.0], 3, 1e20)[1] == pytest.approx(3e-20, rel=1e-12)


def test_more_eigenvalues_than_rows_are_refused():
    with pytest.raises(RefluenceError, match="m = 2 rows has no 3 eigenvalues"):
        corrected_damping([1.0, 1.0, 1.0], 2, 10.0)


@settings(deadline=None)
@given(
    values=spectra,
    negative=st.lists(st.floats(-10, -1e-3), min_size=1, max_size=4),
    extra=st.integers(0, 40),
    target=st.floats(1e-3, 1e3),
)
def test_with_negative_eigenvalues_the_law_holds_above_the_last_pole(values, negative, extra, target):
    everything, size = [*negative, *values], len(values) + len(negative) + extra
    assume(-max(negative) > 1e-5 * max(values))  # less is rounding noise
    damping = corrected_damping(everything, size, target)
    padded = np.array([*everything, *[0.0] * extra])
    assert damping > -padded.min()
    assert 1 / target == pytest.approx((1 / (padded + damping)).mean(), rel=1e-6)


def test_the_correction_of_a_negative_spectrum_is_found_by_hand():
    # 1/κ = (1/(μ−1) + 1/(μ+1))/2 = μ/(μ²−1), so that μ² − κμ − 1 = 0.
    for target in (0.01, 0.5, 3.0, 100.0):
        expected = (target + (target**2 + 4) ** 0.5) / 2
        assert corrected_damping([-1.0, 1.0], 2, target) == pytest.approx(expected, rel=1e-9)


def test_rounding_noise_below_zero_is_no_negative_eigenvalue():
    assert corrected_damping([1.0, 0.5, -1e-12], 5, 0.3) == pytest.approx(corrected_damping([1.0, 0.5], 5, 0.3))


def draws_of(count, size, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, d, dtype=torch.float64, generator=generator) / size**0.5


@settings(deadline=None)
@given(values=spectra, extra=st.integers(0, 40), damping=st.floats(1e-4, 1e4))
def test_the_dimension_of_a_sketch_is_its_own_and_belongs_to_the_damping_that_it_implies(values, extra, damping):
    size = len(values) + extra
    target, dimension = sketched_dimension(values, size, damping)
    assert target == implied_damping(values, size, damping)
    assert dimension == pytest.approx(effective_dimension(values, damping), rel=1e-6, abs=1e-9 * size)


@pytest.mark.parametrize("size", [60, 120, 240])
def test_the_dimension_of_a_sketch_is_the_exact_one_but_for_an_error_of_order_one(size):
    spectrum = torch.logspace(0, -3, 300, dtype=torch.float64)
    errors = []
    for P in draws_of(40, size, 300, 0):
        found = torch.linalg.eigvalsh((P * spectrum) @ P.T).clamp(min=0)
        target, dimension = sketched_dimension(found, size, 0.01)
        errors.append(dimension - effective_dimension(spectrum, target))
    assert abs(np.mean(errors)) < 0.6
    assert np.std(errors) < 1.2


@settings(deadline=None)
@given(values=spectra, extra=st.integers(0, 40), damping=st.floats(1e-3, 1e3))
def test_the_variance_scale_is_that_of_the_implied_damping_and_its_derivative(values, extra, damping):
    """κ²/(mκ') with κ' by differences."""
    size, step = len(values) + extra, 1e-4 * damping
    up, down = (implied_damping(values, size, damping + sign * step) for sign in (1, -1))
    expected = implied_damping(values, size, damping) ** 2 / (size * (up - down) / (2 * step))
    assert sketch_variance_scale(values, size, damping) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("entries", ["gaussian", "signs"])
def test_the_first_order_variance_of_corrected_scores_is_that_of_a_simulation(entries):
    """For every pair of four gradients in range(C) and one partly outside, with m = 1.5 d_κ."""
    d, size, kappa, draws = 150, 80, 0.1, 800
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.logspace(0, -3, d, dtype=torch.float64)
    spectrum[120:] = 0
    X = torch.randn(5, d, dtype=torch.float64, generator=generator) * (spectrum + 1e-12).sqrt()
    X[4, 120:] = 0.1 * torch.randn(30, dtype=torch.float64, generator=generator)
    exact = (X / (spectrum + kappa)) @ X.T
    assert 1.5 < size / effective_dimension(spectrum, kappa) < 1.6
    values, predicted = [], []
    for P in draws_of(draws, size, d, 2):
        P = P.sign() / size**0.5 if entries == "signs" else P
        eigenvalues, Q = torch.linalg.eigh((P * spectrum) @ P.T)
        mu = corrected_damping(eigenvalues.clamp(min=0), size, kappa)
        projected = X @ P.T @ Q
        values.append((projected / (eigenvalues + mu)) @ projected.T)
        s = (projected / (eigenvalues + mu).square()) @ projected.T
        scale = sketch_variance_scale(eigenvalues.clamp(min=0), size, mu)
        predicted.append(scale * (s.diagonal()[:, None] * s.diagonal() + s.square()))
    values, predicted = torch.stack(values), torch.stack(predicted)
    # 800 draws know a variance to 5 %; the formula leaves out terms of relative order 1/m.
    ratio = predicted.mean(0) / (values - exact).square().mean(0)
    assert (ratio > 0.85).all()
    # Entries of ± 1 have a negative fourth cumulant, so that the formula is conservative for them.
    assert entries == "signs" or (ratio < 1.15).all()
    covered = ((values - exact).abs() <= 1.959964 * predicted.sqrt()).double().mean(0)
    assert (covered > 0.92).all()
