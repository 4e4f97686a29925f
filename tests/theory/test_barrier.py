"""Does a sketch keep every dimension of range(C)?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refluence as rf
from refluence.errors import RefluenceError
from refluence.theory import injective, lost_dimensions


def rows_of_rank(n: int, d: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, rank, dtype=torch.float64, generator=generator) for size in (n, d))
    return left @ right.T


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rank=st.integers(1, 12), m=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_a_gaussian_sketch_is_injective_exactly_from_the_rank_on(rank, m, seed):
    G = rows_of_rank(15, 40, rank, seed)
    P = torch.randn(m, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    U = torch.linalg.svd(G, full_matrices=False)[2][:rank].T
    assert injective(G @ P.T, rank) == injective(P @ U, rank) == (m >= rank)
    assert lost_dimensions(G @ P.T, rank) == lost_dimensions(P @ U, rank) == max(0, rank - m)


@pytest.mark.parametrize("m", [4, 5, 9])
def test_undamped_scores_are_exact_if_and_only_if_the_sketch_is_injective(m):
    rank, n = 5, 12
    G = rows_of_rank(n, 30, rank)
    P = rf.sketches.Gaussian(m, seed=3).matrix(30)
    C = G.T @ G / n
    exact = G @ torch.linalg.pinv(C, rtol=1e-10) @ G.T
    sketched = (G @ P.T) @ torch.linalg.pinv(P @ C @ P.T, rtol=1e-10) @ (G @ P.T).T
    assert injective(G @ P.T, rank) == torch.allclose(exact, sketched, rtol=1e-7, atol=1e-7)


def test_what_is_lost_has_no_undamped_score_at_all():
    U = torch.eye(6, 4, dtype=torch.float64)
    P = torch.zeros(5, 6, dtype=torch.float64)
    P[range(3), range(3)] = 1.0
    P[3, 0] = 2.0
    assert lost_dimensions(P @ U, 4) == 1
    assert not (P @ U[:, 3]).any()


def test_a_sketch_with_two_equal_rows_is_not_injective_however_wide():
    P = torch.ones(8, 30, dtype=torch.float64)
    assert lost_dimensions(rows_of_rank(10, 30, 3) @ P.T, 3) == 2


def test_the_cut_decides_what_counts_as_a_dimension():
    sketched = torch.diag(torch.tensor([1.0, 1e-3, 1e-8], dtype=torch.float64))
    assert lost_dimensions(sketched, 3) == 0
    assert lost_dimensions(sketched, 3, cut=1e-6) == 1
    assert lost_dimensions(sketched.float(), 3) == 1  # below the rounding of float32


def test_a_rank_below_that_of_the_sketched_rows_is_refused():
    with pytest.raises(RefluenceError, match="have rank 3, more than rank = 2"):
        injective(torch.eye(3), 2)
