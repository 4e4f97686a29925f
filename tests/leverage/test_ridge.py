"""Ridge leverage against the dense formula, by every way of asking for λ and of computing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.errors import RefluenceError
from refluence.leverage.compute import checked_ridge
from support.leverage import deficient, ridge, with_spectrum

METHODS = ("auto", "exact", "gram", "dual")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [200, 12, 7])
@pytest.mark.parametrize("damping", [1e-6, 1e-3, 10.0])
def test_the_dense_formula(method, rows, damping):
    X = deficient()[:rows]
    found = rf.leverage_scores(X, damping, method)
    torch.testing.assert_close(found.values, ridge(X, damping), rtol=1e-7, atol=1e-9)
    assert found.effective_dimension == pytest.approx(float(found.values.sum()))
    assert found.damping == damping
    assert found.rank is None


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("damping", [1e-9, 1e-13, 1e-17])
def test_a_ridge_below_the_rounding_of_the_gram_matrix(method, damping):
    """Of a matrix with singular values down to 1e-8 of the largest, against ½-precision-free U Σ²/(Σ² + nλ) Uᵀ."""
    sigma = torch.logspace(0, -8, 20, dtype=torch.float64)
    X = with_spectrum(300, sigma)
    U, s, _ = torch.linalg.svd(X, full_matrices=False)
    expected = (U.square() * (s**2 / (s**2 + 300 * damping))).sum(dim=1)
    torch.testing.assert_close(rf.leverage_scores(X, damping, method).values, expected, rtol=0, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0.02, 0.98), method=st.sampled_from(METHODS), seed=st.integers(0, 20))
def test_effective_dimension_is_the_sum(share, method, seed):
    X = with_spectrum(40, torch.logspace(0, -3, 8, dtype=torch.float64), seed)
    found = rf.leverage_scores(X, rf.EffectiveDimension(8 * share), method)
    assert float(found.values.sum()) == pytest.approx(8 * share, rel=1e-6)
    torch.testing.assert_close(found.values, ridge(X, found.damping), rtol=1e-6, atol=1e-10)


def test_an_effective_dimension_that_only_tiny_eigenvalues_give():
    X = with_spectrum(100, torch.logspace(0, -7, 10, dtype=torch.float64))
    found = rf.leverage_scores(X, rf.EffectiveDimension(9.5))
    assert found.method == "exact"
    assert float(found.values.sum()) == pytest.approx(9.5, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_is_of_the_mean_eigenvalue(method):
    X = deficient()
    found = rf.leverage_scores(X, rf.RelativeDamping(0.3), method)
    assert found.damping == pytest.approx(0.3 * float(X.square().sum()) / X.shape[0] / X.shape[1])
    torch.testing.assert_close(found.values, ridge(X, found.damping), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("asked", [-1e-3, float("nan"), float("inf"), "auto", "big", {"X": 1.0}, True])
def test_what_is_no_ridge_is_named(asked):
    with pytest.raises(RefluenceError, match=r"(ridge|damping) must be a number ≥ 0.*not"):
        checked_ridge(asked, intercept=False)
    if isinstance(asked, float):
        with pytest.raises(RefluenceError, match="must be a number ≥ 0"):
            rf.leverage_scores(np.eye(3), asked)


def test_an_effective_dimension_above_the_rank_is_refused():
    with pytest.raises(RefluenceError, match="between 0 and the rank"):
        rf.leverage_scores(deficient(), rf.EffectiveDimension(8.5))


def test_more_damping_is_less_leverage():
    X = deficient()
    values = [rf.leverage_scores(X, damping).values for damping in (0.0, 1e-3, 1e-1, 10.0)]
    for one, other in pairwise(values):
        assert bool((one >= other - 1e-12).all())


def test_unknown_methods_and_settings_are_named():
    X = deficient()
    with pytest.raises(RefluenceError, match=r"unknown method 'svd': use one of auto, exact"):
        rf.leverage_scores(X, method="svd")
    with pytest.raises(RefluenceError, match="rtol must lie between 0 and 1, not 2"):
        rf.leverage_scores(X, rtol=2)
    with pytest.raises(RefluenceError, match="accuracy must lie between 0 and 1, not 0"):
        rf.leverage_scores(X, accuracy=0)
    with pytest.raises(RefluenceError, match="sketch must be one of rows"):
        rf.leverage_scores(X, method="sketch", sketch=rf.sketches.Kronecker(4, 4))
