"""The exact side against dense float64 linear algebra in d dimensions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from refluence.errors import DataError
from refluence.studies.folder import StudyFolder
from refluence.studies.projection.problem import Problem, ProblemOptions
from refluence.studies.projection.spectral import Spectral

DAMPINGS = (1e-6, 1e-3, 1e-1, 10.0)


@pytest.fixture(scope="module")
def fisher(gradients):
    train, _ = gradients
    return train.T @ train / len(train)


def test_eigenvalues_and_rank_are_those_of_the_fisher(spectral, fisher):
    values = torch.linalg.eigvalsh(fisher).flip(0)
    top = len(spectral.eigenvalues)
    assert_close(spectral.eigenvalues, values[:top].clamp(min=0), rtol=1e-9, atol=1e-12 * float(values[0]))
    assert spectral.cut == int((values > 1e-10 * values[0]).sum())
    assert (spectral.n, len(spectral.tests)) == (60, 12)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_scores_are_those_of_the_inverse(spectral, gradients, fisher, damping):
    train, tests = gradients
    exact = train @ torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=torch.float64), tests.T)
    assert_close(spectral.scores(damping), exact, rtol=1e-7, atol=1e-9 * float(exact.abs().max()))


@pytest.mark.parametrize("damping", DAMPINGS)
def test_dimension_is_the_trace(spectral, fisher, damping):
    trace = torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=torch.float64), fisher).trace()
    assert spectral.dimension(damping) == pytest.approx(float(trace), rel=1e-9)


def test_normalisers_are_the_quadratic_forms(spectral, gradients, fisher):
    values, vectors = torch.linalg.eigh(fisher)
    kept = values > 1e-10 * values[-1]
    for rows, found, gaps in zip(gradients, spectral.tau_0(), spectral.gap(1e-2), strict=True):
        coordinates = (rows @ vectors[:, kept]).square()
        assert_close(found, coordinates @ (1 / values[kept]), rtol=1e-6, atol=0)
        difference = coordinates @ (1 / values[kept]) - coordinates @ (1 / (values[kept] + 1e-2))
        assert_close(gaps, difference, rtol=1e-6, atol=0)


def test_the_rank_cut_moves_tau_0_and_nothing_else(spectral):
    coarse = Spectral.restored(spectral.tensors(), rank_cut=1e-2)
    assert coarse.cut < spectral.cut
    assert bool((coarse.tau_0()[1] < spectral.tau_0()[1]).all())
    assert_close(coarse.scores(0.1), spectral.scores(0.1), rtol=0, atol=0)


def test_what_lies_outside_is_what_no_train_gradient_has(spectral, gradients):
    train, tests = gradients
    _, values, basis = torch.linalg.svd(train, full_matrices=False)
    basis = basis[values > 1e-6 * values[0]]
    outside = tests - tests @ basis.T @ basis
    assert_close(spectral.kernel_norms(), outside.norm(dim=1), rtol=1e-4, atol=1e-9)
    assert float(spectral.kernel_norms().max()) > 1e-3
    assert_close(spectral.test_norms(), tests.norm(dim=1), rtol=1e-7, atol=0)
    assert_close(spectral.outside @ spectral.outside.T, outside @ outside.T, rtol=1e-5, atol=1e-8)


def test_train_gradients_can_take_the_place_of_tests(spectral, gradients):
    own = spectral.of_train(7)
    exact = spectral.n**0.5 * spectral.basis * spectral.roots
    assert_close(own.tests, exact[:7], rtol=1e-12, atol=0)
    assert_close(own.tests @ own.tests.T, gradients[0][:7] @ gradients[0][:7].T, rtol=1e-7, atol=1e-12)
    assert own.outside.shape == (7, 0)


@given(st.integers(2, 9), st.integers(1, 5), st.integers(1, 12), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_any_gram_matrix_gives_its_scores(n, k, d, seed):
    """Full rank or not, more examples than parameters or fewer."""
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((n + k, d)))
    train, tests = rows[:n], rows[n:]
    found = Spectral.of_gram(rows @ rows.T, n).scores(0.3)
    fisher = train.T @ train / n + 0.3 * torch.eye(d, dtype=torch.float64)
    assert_close(found, train @ torch.linalg.solve(fisher, tests.T), rtol=1e-8, atol=1e-8)


def test_gradients_that_are_all_zero_are_refused():
    with pytest.raises(DataError, match="all train gradients are zero"):
        Spectral.of_gram(torch.zeros(5, 5, dtype=torch.float64), 3)


def test_a_cached_spectrum_of_other_weights_is_not_used(problem, spectral, tmp_path):
    """Studies share a folder by a hash of weights and rows, not by their number."""
    folder = StudyFolder(tmp_path / "out", "x", {})
    folder.begin()
    cache = tmp_path / "cache"
    own = problem.spectral(folder, cache)
    other = Problem(ProblemOptions(**{**problem.options.__dict__, "epochs": 1}), progress=False)
    assert_close(own.scores(0.1), spectral.scores(0.1), rtol=0, atol=0)
    assert float((other.spectral(folder, cache).eigenvalues - own.eigenvalues).abs().max()) > 1e-6
    assert len(list(cache.iterdir())) == 2
