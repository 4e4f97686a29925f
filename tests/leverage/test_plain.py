"""Leverage at λ = 0 against the singular value decomposition, where the rank is clear and where it is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.errors import RefluenceError
from support.leverage import deficient, plain, with_spectrum

METHODS = ("auto", "exact", "gram", "dual")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_diagonal_of_the_projection_on_the_column_space(method, shape):
    X = {"tall": deficient(200), "wide": deficient(200)[:7], "square": deficient(200)[:12]}[shape]
    found = rf.leverage_scores(X, method=method)
    torch.testing.assert_close(found.values, plain(X), rtol=0, atol=1e-12)
    assert found.rank == round(float(plain(X).sum()))
    assert found.effective_dimension == found.rank
    assert found.damping == 0


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60), d=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 99),
    method=st.sampled_from(METHODS),
)  # fmt: skip
def test_sums_to_the_rank_lies_in_0_1_and_moves_with_the_rows(n, d, rank, seed, method):
    rank = min(n, d, rank)
    X = with_spectrum(n, torch.linspace(1, 0.2, rank).double(), seed) if rank == d <= n else low_rank(n, d, rank, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    found, moved = rf.leverage_scores(X, method=method), rf.leverage_scores(X[order], method=method)
    assert found.rank == rank
    assert float(found.values.sum()) == pytest.approx(rank, abs=1e-9)
    assert float(found.values.min()) >= 0
    assert float(found.values.max()) <= 1
    torch.testing.assert_close(moved.values, found.values[order], rtol=0, atol=1e-9)


def low_rank(n, d, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, rank, generator=generator).double()).Q
    return left @ torch.linalg.qr(torch.randn(d, rank, generator=generator).double()).Q.T


def test_zero_columns_make_no_row_special():
    """Unpivoted QR puts a row of the identity in Q for each column that is zero: h = 1 for the first rows."""
    X = torch.cat([torch.zeros(100, 4).double(), with_spectrum(100, torch.ones(5).double())], dim=1)
    wrong = torch.linalg.qr(X).Q.square().sum(dim=1)
    assert float(wrong.sum()) == pytest.approx(9)
    for method in METHODS:
        found = rf.leverage_scores(X, method=method)
        torch.testing.assert_close(found.values, plain(X), rtol=0, atol=1e-12)
        assert found.rank == 5


@pytest.mark.parametrize("decades", [3, 6, 9, 11])
@pytest.mark.parametrize("method", ["auto", "exact"])
def test_the_rank_is_decided_far_below_the_rounding_of_the_gram_matrix(method, decades):
    sigma = torch.logspace(0, -decades, 20, dtype=torch.float64)
    X = with_spectrum(400, torch.cat([sigma, torch.zeros(4).double()]))
    found = rf.leverage_scores(X, method=method)
    assert found.rank == 20
    left = torch.linalg.svd(X, full_matrices=False).U[:, :20]
    torch.testing.assert_close(found.values, left.square().sum(1), rtol=0, atol=10 * 10.0 ** (decades - 16))
    assert found.gap.clear
    assert found.gap.kept == pytest.approx(float(sigma[-1]), rel=10.0 ** (decades - 13))


def test_gram_sees_singular_values_to_the_root_of_the_rounding_only():
    X = with_spectrum(400, torch.tensor([1.0, 0.1, 1e-11]).double())
    assert rf.leverage_scores(X, method="gram").rank == 2
    assert rf.leverage_scores(X, method="auto", rtol=1e-14).rank == 3
    assert rf.leverage_scores(X, method="exact", rtol=1e-14).rank == 3


@pytest.mark.parametrize("method", ["auto", "exact", "dual"])
def test_a_spectrum_without_a_gap_at_the_cut_is_warned_about(method):
    n = 30 if method == "dual" else 400
    X = with_spectrum(n, torch.logspace(0, -15, 30, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"rank \d+ of X is not certain.*ridge"):
        found = rf.leverage_scores(X, method=method)
    assert not found.gap.clear


def test_auto_cuts_a_clear_spectrum_where_the_triangular_factor_would():
    """√(nε) is no small share of σ₁ where n is large, and no reason to doubt a rank."""
    X = with_spectrum(30_000, torch.tensor([1.0, 6e-4]).double())
    found = rf.leverage_scores(X)
    assert found.method == "gram"
    assert found.gap.cut == pytest.approx(30_000 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("method", ["auto", "exact", "gram", "dual"])
def test_rtol_moves_the_cut(method):
    X = with_spectrum(50, torch.tensor([1.0, 0.5, 1e-3]).double())
    found = rf.leverage_scores(X, method=method, rtol=1e-2)
    assert found.rank == 2
    torch.testing.assert_close(found.values, plain(X, rtol=1e-2), rtol=0, atol=1e-8)
    assert found.gap.dropped == pytest.approx(1e-3)
    assert found.gap.cut == pytest.approx(1e-2)


def test_a_row_alone_in_a_direction_has_leverage_one():
    X = torch.cat([with_spectrum(40, torch.ones(3).double()), torch.zeros(40, 1).double()], dim=1)
    X[7, 3] = 1e-6
    assert float(rf.leverage_scores(X).values[7]) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_of_zeros_has_rank_0(method):
    found = rf.leverage_scores(torch.zeros(5, 3), method=method)
    assert found.rank == 0
    assert not found.values.any()
    assert found.gap is None


@pytest.mark.parametrize("scale", [1e-170, 1e170])
def test_entries_whose_squares_leave_the_range(scale):
    X = deficient(60)
    found = rf.leverage_scores(X * scale)
    assert found.rank == 8
    torch.testing.assert_close(found.values, plain(X), rtol=0, atol=1e-11)
    if scale > 1:
        with pytest.raises(RefluenceError, match='squares of X overflow: scale it down, or use method="exact"'):
            rf.leverage_scores(X * scale, method="gram")


def test_copies_of_a_column_change_nothing_at_any_ridge():
    X = with_spectrum(60, torch.linspace(1, 0.1, 4).double())
    many = X[:, [0, 1, 2, 3]] * 1.0
    doubled = torch.cat([many, many[:, :2], torch.zeros(60, 2).double()], dim=1)
    torch.testing.assert_close(rf.leverage_scores(doubled).values, rf.leverage_scores(X).values, rtol=0, atol=1e-12)
