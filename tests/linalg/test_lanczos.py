"""Lanczos, Ritz pairs and bounds of the spectrum against dense eigendecompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import SolverError
from refluence.linalg.lanczos import lanczos, ritz_pairs, spectral_bounds


def symmetric(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (vectors * values) @ vectors.T


def starts(d, k, seed=1):
    return torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


D = 30
SPECTRA = {
    "falling": [1.5**-i for i in range(D)],
    "negative": [(-1.2) ** -i for i in range(D)],
    "clustered": [1.0 + 1e-11 * i for i in range(10)]
    + [0.1 + 1e-11 * i for i in range(10)]
    + [1e-6 * i for i in range(10)],
    "zeros": [2.0, 1.0, 0.5, -0.25] + [0.0] * (D - 4),
    "repeated": [2.0] * 4 + [1.0] * 6 + [-1.5] * 5 + [0.0] * 15,
    "multiple of the identity": [0.7] * D,
    "spread": [10.0 ** (-i / 4) for i in range(D)],
}
spectra = pytest.mark.parametrize("name", SPECTRA)


# ---------------------------------------------------------------- Lanczos


@spectra
@pytest.mark.parametrize("steps", [1, 5, D, D + 9])
def test_bases_are_orthonormal_and_project_to_the_tridiagonal_matrices(name, steps):
    C, V = symmetric(SPECTRA[name]), starts(D, 3)
    found = lanczos(lambda v: C @ v, V, steps)
    assert found.diagonal.shape == (3, min(steps, D))
    for i, grade in enumerate(found.grades.tolist()):
        Q = found.basis[:grade, i].T
        torch.testing.assert_close(Q.T @ Q, torch.eye(grade, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(Q[:, 0], V[:, i] / V[:, i].norm())
        torch.testing.assert_close(Q.T @ C @ Q, found.matrices()[i, :grade, :grade], rtol=0, atol=1e-11)
        assert (found.basis[grade:, i] == 0).all()


@spectra
def test_the_krylov_space_ends_at_the_grade(name):
    C, V = symmetric(SPECTRA[name]), starts(D, 2)
    distinct = torch.tensor(SPECTRA[name], dtype=torch.float64).mul(1e7).round().unique().numel()
    found = lanczos(lambda v: C @ v, V, D)
    if name in ("zeros", "repeated", "multiple of the identity"):
        assert found.grades.tolist() == [distinct] * 2
    for i, grade in enumerate(found.grades.tolist()):
        Q = found.basis[:grade, i].T
        torch.testing.assert_close(C @ Q, Q @ (Q.T @ C @ Q), rtol=0, atol=1e-11)


def test_starts_of_different_grades_do_not_disturb_each_other():
    C = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    V = torch.zeros(6, 3, dtype=torch.float64)
    V[2, 0] = 5.0
    V[:2, 1] = 1.0
    V[:, 2] = 1.0
    found = lanczos(lambda v: C @ v, V, 6)
    assert found.grades.tolist() == [1, 2, 6]
    torch.testing.assert_close(found.diagonal[0, 0], torch.tensor(3.0).double())
    alone = lanczos(lambda v: C @ v, V[:, 2:], 6)
    torch.testing.assert_close(found.diagonal[2:], alone.diagonal)


def test_a_zero_start_and_a_product_that_is_not_finite_are_refused():
    with pytest.raises(SolverError, match="zero"):
        lanczos(lambda v: v, torch.zeros(4, 2), 3)
    with pytest.raises(SolverError, match="not finite"):
        lanczos(lambda v: v * float("inf"), starts(4, 2), 3)


# ---------------------------------------------------------------- Ritz pairs


def check_pairs(C, found, rank, tolerance):
    vectors, values = found.vectors.double(), found.values
    exact = torch.linalg.eigvalsh(C)
    exact = exact[exact.abs().argsort(descending=True)]
    top = float(exact.abs().max())
    assert vectors.shape == (len(C), min(rank, len(C)))
    torch.testing.assert_close(values.abs(), exact.abs()[: len(values)], rtol=0, atol=2 * tolerance * top)
    gram = vectors.T @ vectors
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=tolerance)
    residuals = (C @ vectors - vectors * values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=0.1, atol=tolerance * top)
    assert (residuals <= 2 * tolerance * top).all()


@spectra
@pytest.mark.parametrize("rank", [1, 2, 4, 13, D, D + 5])
def test_the_pairs_of_largest_magnitude_are_found(name, rank):
    C = symmetric(SPECTRA[name])
    check_pairs(C, ritz_pairs(lambda v: C @ v, D, rank, tolerance=1e-9), rank, 1e-9)


@pytest.mark.parametrize("block", [1, 3, 8])
def test_restarts_lose_nothing(block):
    values = [1.05**-i * (-1) ** (i % 3) for i in range(120)]
    C = symmetric(values)
    found = ritz_pairs(lambda v: C @ v, 120, 5, tolerance=1e-8, krylov=14, block=block, products=10_000)
    check_pairs(C, found, 5, 1e-8)
    assert found.products > 14


def test_the_rank_is_all_and_the_subspaces_end_early():
    C = symmetric([1.0] * 3 + [0.0] * 27)
    for block in (1, 2, 8):
        found = ritz_pairs(lambda v: C @ v, D, D, tolerance=1e-10, block=block)
        check_pairs(C, found, D, 1e-10)
        torch.testing.assert_close((found.vectors * found.values) @ found.vectors.T, C, rtol=0, atol=1e-12)


def test_the_number_of_products_is_kept_and_the_residuals_say_what_is_missing():
    C = symmetric([1.01**-i for i in range(200)])
    columns = []

    def apply(v):
        columns.append(v.shape[1])
        return C @ v

    found = ritz_pairs(apply, 200, 3, tolerance=1e-12, products=24)
    assert sum(columns) == found.products == 24
    residuals = (C @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals)
    assert residuals.max() > 1e-6


def test_pairs_in_float32():
    C = symmetric(SPECTRA["spread"])
    found = ritz_pairs(lambda v: C.float() @ v, D, 6, tolerance=1e-5, dtype=torch.float32)
    assert found.vectors.dtype == torch.float32
    check_pairs(C, found, 6, 1e-5)


def test_pairs_are_a_function_of_the_seed():
    C = symmetric(SPECTRA["falling"])
    one, other = (ritz_pairs(lambda v: C @ v, D, 3, seed=4) for _ in range(2))
    assert torch.equal(one.vectors, other.vectors)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=24),
    rank=st.integers(1, 24),
    block=st.integers(1, 9),
)
def test_full_rank_gives_every_eigenvalue_with_its_multiplicity(values, rank, block):
    C = symmetric([float(v) for v in values])
    found = ritz_pairs(lambda v: C @ v, len(values), len(values), tolerance=1e-9, block=block)
    torch.testing.assert_close(found.values.sort().values, torch.tensor(sorted(values)).double(), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- bounds


@spectra
@pytest.mark.parametrize("steps", [8, D])
def test_the_spectrum_lies_between_the_bounds(name, steps):
    C = symmetric(SPECTRA[name])
    low, high = spectral_bounds(lambda v: C @ v, D, steps=steps)
    exact = torch.linalg.eigvalsh(C)
    assert low <= exact[0] + 1e-12
    assert high >= exact[-1] - 1e-12
    if steps == D:
        assert low == pytest.approx(float(exact[0]), abs=1e-8)
        assert high == pytest.approx(float(exact[-1]), abs=1e-8)


def test_the_upper_bound_is_tight_after_few_steps():
    C = symmetric([1.0, 0.5] + [0.1 * 0.99**i for i in range(300)])
    _, high = spectral_bounds(lambda v: C @ v, 302, steps=30)
    assert 1.0 <= high < 1.05
