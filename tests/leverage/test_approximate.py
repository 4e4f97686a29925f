"""Sketched and sampled scores: near the exact ones, as near as they say, and repeatable."""

from __future__ import annotations

import pytest
import torch

import refluence as rf
from refluence.errors import RefluenceError
from refluence.leverage.recursive import DrawnRows
from support.leverage import plain, ridge, with_spectrum


def rows(n=4000, d=30, seed=0):
    """Rows of uneven length, so of uneven leverage."""
    X = with_spectrum(n, torch.logspace(0, -2, d, dtype=torch.float64), seed)
    return X * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)).double() ** -0.3


def error_of(found, exact):
    return float((found.values / exact - 1).square().mean().sqrt())


SKETCHES = [None, rf.sketches.SJLT(256, 8), rf.sketches.Gaussian(256), rf.sketches.Rademacher(256)]


@pytest.mark.parametrize("sketch", SKETCHES)
def test_sketched_plain_leverage(sketch):
    X = rows()
    found = rf.leverage_scores(X, method="sketch", sketch=sketch, seed=3)
    error = error_of(found, plain(X))
    assert error < 0.25
    assert found.relative_error == pytest.approx(error, rel=0.6)
    assert found.rank == 30
    # without the factor 1 − r/m the sum would be too large by m/(m − r) = 1.13
    assert float(found.values.sum()) == pytest.approx(30, rel=0.07)


def test_a_finer_accuracy_is_kept():
    X = rows()
    found = rf.leverage_scores(X, method="sketch", accuracy=0.08)
    assert error_of(found, plain(X)) < 0.08


@pytest.mark.parametrize("asked", [1e-6, rf.RelativeDamping(0.1), rf.EffectiveDimension(12.0)])
def test_sketched_ridge_leverage(asked):
    X = rows()
    found = rf.leverage_scores(X, asked, "sketch", sketch=rf.sketches.SJLT(512, 8))
    exact = ridge(X, found.damping)
    assert error_of(found, exact) < 0.25
    assert found.relative_error == pytest.approx(error_of(found, exact), rel=0.6)
    assert float(found.values.sum()) == pytest.approx(float(exact.sum()), rel=0.07)
    if isinstance(asked, rf.EffectiveDimension):
        assert float(exact.sum()) == pytest.approx(12.0, rel=0.1)


@pytest.mark.parametrize("damping", [1e-6, rf.RelativeDamping(1.0)])
@pytest.mark.parametrize("options", [{}, {"center": True}])
def test_recursive_sampling(damping, options):
    X = rows(6000, 40) + (1e-3 if options else 0)
    found = rf.leverage_scores(X, damping, "recursive", accuracy=0.5, **options)
    exact = rf.leverage_scores(X, found.damping, "exact", **options).values
    assert 1e-4 < error_of(found, exact) < 0.25  # not all rows were drawn
    assert found.relative_error == pytest.approx(error_of(found, exact), rel=0.6)


def test_recursive_sampling_where_fewer_rows_are_drawn_than_there_are_columns():
    X = with_spectrum(3000, torch.logspace(0, -4, 600, dtype=torch.float64))
    found = rf.leverage_scores(X, 1e-3, "recursive", accuracy=0.5)
    exact = ridge(X, 1e-3)
    assert found.effective_dimension < 15  # some 32 times as many are drawn
    assert 1e-3 < error_of(found, exact) < 0.3


@pytest.mark.parametrize("count", [5, 30])
def test_both_forms_of_the_drawn_rows_are_the_same_inverse(count):
    B = with_spectrum(max(count, 12), torch.linspace(1, 0.1, 12).double())[:count]
    drawn = DrawnRows(B, 0.3)
    inverse = torch.linalg.inv(B.T @ B + 0.3 * torch.eye(12).double())
    X = with_spectrum(20, torch.ones(12).double())
    assert drawn.few == (count == 5)
    torch.testing.assert_close(drawn.inverse(X.T), inverse @ X.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(drawn.forms(X), (X @ inverse * X).sum(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["sketch", "recursive"])
def test_a_seed_repeats_its_scores(method):
    X = rows(3000)
    one, same, other = (rf.leverage_scores(X, 1e-6, method, accuracy=0.5, seed=seed).values for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_what_the_approximate_methods_cannot_do_is_said():
    with pytest.raises(RefluenceError, match=r'"recursive" draws rows .* give ridge as a number'):
        rf.leverage_scores(rows(300), 0.0, "recursive")
    with pytest.raises(RefluenceError, match=r'"recursive" draws rows'):
        rf.leverage_scores(rows(300), rf.EffectiveDimension(5), "recursive")
    with pytest.raises(RefluenceError, match=r'm must lie between the two. Use method="auto"'):
        rf.leverage_scores(rows(100), method="sketch")
