"""Bounds that hold for every pair, against scores by a general solve."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import RefluenceError
from refluence.theory import (
    distortion,
    distortion_factor,
    effective_dimension,
    error_bound,
    gap,
    least_size,
    pair_bounds,
    range_error,
    range_norms,
)
from support.reference import bilinear, curvature

few = settings(max_examples=25, deadline=None, derandomize=True)
cases = given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 14),
    m=st.integers(1, 60),
    damping=st.floats(1e-3, 10.0),
    decay=st.floats(0.0, 3.0),
)


def gaussian(m: int, d: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(m, d, dtype=torch.float64, generator=generator) / m**0.5


def problem(seed: int, n: int, m: int, decay: float, d: int = 20, k: int = 5):
    """Train gradients, test gradients in their span, and a sketch."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -decay, d, dtype=torch.float64)
    G = torch.randn(n, d, dtype=torch.float64, generator=generator) * scales
    V = torch.randn(k, n, dtype=torch.float64, generator=generator) @ G
    return G, V, gaussian(m, d, generator)


def scores(V, G, P, damping):
    """(exact, sketched)."""
    C = curvature(G)
    return bilinear(V, G, C, damping), bilinear(V @ P.T, G @ P.T, P @ C @ P.T, damping)


def root(C):
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@few
@cases
def test_no_error_of_any_pair_exceeds_the_bound_of_the_distortion(seed, n, m, damping, decay):
    G, V, P = problem(seed, n, m, decay)
    K, sketched = G @ G.T / n, G @ P.T @ P @ G.T / n
    factor = distortion_factor(distortion(K, sketched, damping))
    train, test = range_norms(K, damping), range_norms(K, damping, G @ V.T)
    exact, found = scores(V, G, P, damping)
    bound = pair_bounds(factor, test.gap, train.gap)
    assert (torch.abs(found - exact) <= bound * (1 + 1e-6) + 1e-9 * exact.abs().max()).all()
    assert (bound <= factor * test.tau_0.sqrt()[:, None] * train.tau_0.sqrt() * (1 + 1e-9)).all()


@few
@cases
def test_the_distortion_is_that_of_the_curvature(seed, n, m, damping, decay):
    G, _, P = problem(seed, n, m, decay)
    C = curvature(G)
    half = torch.linalg.inv(root(C + damping * torch.eye(20, dtype=torch.float64)))
    expected = torch.linalg.eigvalsh(half @ (root(C) @ P.T @ P @ root(C) - C) @ half)
    found = distortion(G @ G.T / n, G @ P.T @ P @ G.T / n, damping)
    assert (found > -1).all()
    # C has d − n eigenvalues more than K, all 0 where n < d.
    padded = torch.cat([found, torch.zeros(20 - n, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(padded, expected, rtol=1e-6, atol=1e-7 * max(1.0, float(expected.abs().max())))


@few
@cases
def test_the_factor_is_reached_by_some_gradient_and_so_is_the_range_error(seed, n, m, damping, decay):
    G, _, P = problem(seed, n, m, decay)
    C, K, sketched = curvature(G), G @ G.T / n, G @ P.T @ P @ G.T / n
    eye = torch.eye(20, dtype=torch.float64)
    E = damping * (torch.linalg.inv(C + damping * eye) - torch.linalg.inv(root(C) @ P.T @ P @ root(C) + damping * eye))
    whole = root(C + damping * eye) @ E @ root(C + damping * eye) / damping
    factor = distortion_factor(distortion(K, sketched, damping))
    assert factor == pytest.approx(float(torch.linalg.eigvalsh(whole).abs().max()), rel=1e-5, abs=1e-7)
    epsilon = range_error(K, sketched, damping)
    assert epsilon == pytest.approx(float(torch.linalg.eigvalsh(E).abs().max()), rel=1e-6, abs=1e-9)
    assert epsilon <= min(1.0, factor) + 1e-9


@few
@cases
def test_range_norms_are_the_undamped_scores_and_their_loss_to_damping(seed, n, m, damping, decay):
    G, V, _ = problem(seed, n, m, decay / 3)
    C = curvature(G)
    pseudo = torch.linalg.pinv(C, rtol=1e-10, hermitian=True)
    for rows, cross in ((G, None), (V, G @ V.T)):
        found = range_norms(G @ G.T / n, damping, cross)
        tau_0 = (rows @ pseudo * rows).sum(1)
        tau_lambda = bilinear(rows, rows, C, damping).diagonal()
        torch.testing.assert_close(found.tau_0, tau_0, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.gap, gap(tau_0, tau_lambda), rtol=1e-5, atol=1e-6 * float(tau_0.max()))


def test_range_norms_leave_out_what_lies_outside_the_range():
    G = torch.eye(2, 4, dtype=torch.float64)
    v = torch.tensor([[1.0, 0.0, 7.0, 0.0]], dtype=torch.float64)
    found = range_norms(G @ G.T / 2, 0.5, G @ v.T)
    assert found.tau_0.item() == pytest.approx(2.0)
    assert found.gap.item() == pytest.approx(1.0)


@few
@cases
def test_the_bound_of_epsilon_holds_where_the_distortion_is_below_epsilon(seed, n, m, damping, decay):
    G, V, P = problem(seed, n, 40 * m, decay)
    K = G @ G.T / n
    delta = distortion(K, G @ P.T @ P @ G.T / n, damping)
    epsilon = float(delta.abs().max())
    if epsilon >= 1:
        return
    train, test = range_norms(K, damping), range_norms(K, damping, G @ V.T)
    exact, found = scores(V, G, P, damping)
    bound = error_bound(epsilon, test.gap, train.gap)
    assert (torch.abs(found - exact) <= bound * (1 + 1e-6) + 1e-9 * exact.abs().max()).all()


def test_the_bound_of_epsilon_by_hand():
    found = error_bound(0.2, torch.tensor([4.0, 1.0]), torch.tensor([9.0]))
    torch.testing.assert_close(found, torch.tensor([[1.5], [0.75]]))
    with pytest.raises(RefluenceError, match=r"0 ≤ ε < 1, not 1\.0"):
        error_bound(1.0, torch.ones(1), torch.ones(1))


def test_the_gap_is_never_negative():
    assert gap(torch.tensor([1.0, 2.0]), torch.tensor([1.0 + 1e-6, 0.5])).tolist() == [0.0, 1.5]


@few
@given(
    values=st.lists(st.floats(1e-4, 1e2), min_size=1, max_size=12),
    damping=st.floats(1e-3, 10.0),
    m=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_no_sketch_beats_the_least_size(values, damping, m, seed):
    """Of Gaussian sketches and of the best possible one, which keeps the top eigenvectors."""
    C = torch.diag(torch.tensor(sorted(values, reverse=True), dtype=torch.float64))
    size = len(values)
    best = torch.eye(min(m, size), size, dtype=torch.float64)
    for P in (best, gaussian(m, size, torch.Generator().manual_seed(seed))):
        reached = range_error(C, C.sqrt() @ P.T @ P @ C.sqrt(), damping)
        assert reached == pytest.approx(0.0, abs=1e-12) or least_size(values, damping * (1 + 1e-6), reached) <= m
    exact = range_error(C, C.sqrt() @ best.T @ best @ C.sqrt(), damping)
    if m < size:
        left = float(C[m, m])
        assert exact == pytest.approx(left / (left + damping), rel=1e-9)
        assert least_size(values, damping * (1 + 1e-6), exact) <= m < least_size(values, damping * (1 - 1e-6), exact)


def test_the_least_size_counts_the_eigenvalues_above_the_threshold():
    assert least_size([8.0, 4.0, 1.0, 0.1], 1.0, 0.75) == 2
    assert least_size(np.array([8.0, 4.0]), 1.0, 0.95) == 0
    with pytest.raises(RefluenceError, match="between 0 and 1, not 1"):
        least_size([1.0], 1.0, 1)


def test_the_least_size_is_of_the_order_of_the_effective_dimension():
    values = torch.logspace(1, -6, 400)
    counted = least_size(values, 1e-2, 0.5)
    assert 0.5 < counted / effective_dimension(values, 1e-2) < 2


def test_a_perfect_sketch_has_no_distortion():
    K = torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))
    assert distortion(K, K, 0.1).abs().max() == 0
    assert distortion(K, 2 * K, 1.0).tolist() == pytest.approx([0.5 / 1.5, 0.5, 2 / 3])
    assert range_error(K, K, 0.1) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("function", [distortion, range_error])
def test_bounds_need_a_damping(function):
    with pytest.raises(RefluenceError, match=r"damping must be > 0, not 0\.0"):
        function(torch.eye(2), torch.eye(2), 0.0)


def test_a_gram_matrix_that_is_not_positive_is_refused():
    with pytest.raises(RefluenceError, match=r"not positive definite at λ = 0\.5"):
        distortion(-torch.eye(2), torch.eye(2), 0.5)
