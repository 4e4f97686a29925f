"""Intercept, centring and weights, whatever the stretches in which the rows are read."""

from __future__ import annotations

import pytest
import torch

import refluence as rf
from refluence.errors import DataError, RefluenceError
from refluence.leverage import matrix
from support.leverage import deficient, plain, ridge

METHODS = ("auto", "exact", "gram", "dual")


@pytest.fixture(params=[1 << 22, 40])
def _stretches(request, monkeypatch):
    """All rows at once, or some at a time."""
    monkeypatch.setattr(matrix, "STRETCH", request.param)
    monkeypatch.setattr(matrix, "ROWS_PER_COLUMN", 1)


@pytest.mark.usefixtures("_stretches")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
class TestAgainstDense:
    def rows(self, weighted):
        X = deficient(50) + 3
        w = torch.rand(50, generator=torch.Generator().manual_seed(1)).double() if weighted else torch.ones(50).double()
        w[3] = 0 if weighted else 1
        return X, w, {"weights": w} if weighted else {}

    def test_intercept_is_a_column_of_ones(self, method, weighted):
        X, w, options = self.rows(weighted)
        found = rf.leverage_scores(X, method=method, intercept=True, **options)
        whole = torch.cat([torch.ones(50, 1).double(), X], dim=1)
        torch.testing.assert_close(found.values, plain(whole * w.sqrt()[:, None]), rtol=0, atol=1e-11)
        assert found.rank == round(float(found.values.sum())) == found.effective_dimension

    def test_the_intercept_is_not_damped(self, method, weighted):
        X, w, options = self.rows(weighted)
        found = rf.leverage_scores(X, 0.1, method, intercept=True, **options)
        whole = torch.cat([torch.ones(50, 1).double(), X], dim=1)
        shifts = torch.diag(torch.tensor([0.0] + [50 * 0.1] * 12).double())
        A = whole.T @ (w[:, None] * whole) + shifts
        expected = w * (whole * torch.linalg.solve(A, whole.T).T).sum(dim=1)
        torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-12)
        assert found.effective_dimension == pytest.approx(float(expected.sum()))

    def test_centring_is_of_the_weighted_mean(self, method, weighted):
        X, w, options = self.rows(weighted)
        centred = (X - (w @ X) / w.sum()) * w.sqrt()[:, None]
        for damping, expected in ((0.0, plain(centred)), (1e-2, ridge(centred, 1e-2))):
            found = rf.leverage_scores(X, damping, method, center=True, **options)
            torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", ["auto", "exact", "gram"])
def test_a_large_constant_column_is_no_direction_of_centred_rows(method):
    X = torch.cat([deficient(60), torch.full((60, 1), 1e7 + 1 / 3).double()], dim=1)
    assert rf.leverage_scores(X, method=method, center=True).rank == 8
    assert rf.leverage_scores(X, method="exact").rank == 9


def test_centring_does_not_cancel():
    """The Gram matrix of X less n x̄x̄ᵀ would keep no digit of these rows."""
    X = deficient(300)
    found = rf.leverage_scores(X + 1e6, method="gram", center=True, rtol=1e-7)
    torch.testing.assert_close(found.values, plain(X - X.mean(0)), rtol=0, atol=1e-6)


def test_effective_dimension_counts_the_intercept():
    found = rf.leverage_scores(deficient(), rf.EffectiveDimension(5.0), intercept=True)
    assert float(found.values.sum()) == pytest.approx(5.0, rel=1e-6)
    with pytest.raises(RefluenceError, match="nothing beside the intercept's 1"):
        rf.leverage_scores(deficient(), rf.EffectiveDimension(1.0), intercept=True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"one number for each of the 200 rows of X, not of shape \(2,\)"),
        ([1.0] * 199 + [-1.0], "that of row 199 is -1"),
        ([float("nan")] + [1.0] * 199, "that of row 0 is nan"),
        ([0.0] * 200, "all weights are 0"),
    ],
)
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(DataError, match=message):
        rf.leverage_scores(deficient(), weights=weights)
