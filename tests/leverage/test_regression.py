"""Cook's distance and DFFITS against fits that really leave each row out."""

from __future__ import annotations

import pytest
import torch

import refluence as rf
from refluence.errors import DataError
from refluence.leverage import cooks_distance, dffits, studentized_residuals
from support.leverage import with_spectrum


def problem(n=40):
    """(features with a column of ones, targets)."""
    X = torch.cat([torch.ones(n, 1).double(), with_spectrum(n, torch.linspace(2, 0.5, 3).double())], dim=1)
    generator = torch.Generator().manual_seed(5)
    return X, X.sum(dim=1) + torch.randn(n, generator=generator).double()


def fitted(X, y):
    return X @ torch.linalg.lstsq(X, y).solution


@pytest.mark.parametrize("intercept", [False, True])
def test_the_formulas_are_what_leaving_a_row_out_does(intercept):
    X, y = problem()
    n, p = X.shape
    scores = rf.leverage_scores(X[:, 1:], intercept=True) if intercept else rf.leverage_scores(X)
    r = y - fitted(X, y)
    variance = r.square().sum() / (n - p)
    cook, moved, student = (f(scores, r) for f in (cooks_distance, dffits, studentized_residuals))
    for i in range(n):
        rest = torch.arange(n) != i
        theta = torch.linalg.lstsq(X[rest], y[rest]).solution
        without = (y[rest] - X[rest] @ theta).square().sum() / (n - 1 - p)
        change = fitted(X, y) - X @ theta
        h = scores.values[i]
        assert float(cook[i]) == pytest.approx(float(change.square().sum() / (p * variance)), rel=1e-9)
        assert float(moved[i]) == pytest.approx(float(change[i] / (without * h).sqrt()), rel=1e-9)
        assert float(student[i]) == pytest.approx(float((y[i] - X[i] @ theta) / (without / (1 - h)).sqrt()), rel=1e-9)


def test_a_row_alone_in_a_direction_is_infinitely_influential():
    X, y = problem()
    X = torch.cat([X, torch.zeros(40, 1).double()], dim=1)
    X[4, 4] = 1.0
    scores, r = rf.leverage_scores(X), y - fitted(X, y)
    for measure in (cooks_distance, dffits):
        found = measure(scores, r)
        assert float(found[4]) == torch.inf
        assert bool(torch.isfinite(found).sum() == 39)
    assert bool(studentized_residuals(scores, r).isnan().sum() == 1)


def test_what_is_no_least_squares_fit_is_refused():
    X, y = problem()
    scores = rf.leverage_scores(X)
    with pytest.raises(DataError, match=r"ridge scores \(λ = 0.1\)"):
        cooks_distance(rf.leverage_scores(X, 0.1), y)
    with pytest.raises(DataError, match=r"40 scores and residuals of shape \(3,\)"):
        dffits(scores, [1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="residual of row 2 is not finite"):
        cooks_distance(scores, [1.0, 2.0, float("nan")] + [0.0] * 37)
    with pytest.raises(DataError, match="all residuals are 0"):
        cooks_distance(scores, torch.zeros(40))
    with pytest.raises(DataError, match="no degree of freedom"):
        cooks_distance(rf.leverage_scores(X[:4]), y[:4])
    with pytest.raises(DataError, match="leave 1 degrees of freedom"):
        dffits(rf.leverage_scores(X[:5]), y[:5])
