"""The randomised Nyström approximation against its formula and against the map itself."""

import pytest
import torch

from refluence.errors import SolverError
from refluence.linalg.nystroem import nystroem_approximation, random_orthonormal


def positive(eigenvalues, seed=0):
    """A dense symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (vectors * values) @ vectors.T


def rebuilt(found):
    vectors, values = found
    return (vectors.double() * values) @ vectors.double().T


SPECTRA = {
    "falling": [2.0**-i for i in range(40)],
    "clustered": [1.0] * 10 + [0.999] * 10 + [1e-3] * 20,
    "repeated": [3.0] * 40,
    "steep": [10.0 ** (-i / 2) for i in range(40)],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 7, 25])
def test_it_is_the_formula_for_its_own_test_matrix(name, rank):
    C = positive(SPECTRA[name])
    omega = random_orthonormal(40, rank, 3, torch.float64, "cpu")
    expected = C @ omega @ torch.linalg.solve(omega.T @ C @ omega, omega.T @ C)
    found = nystroem_approximation(lambda v: C @ v, 40, rank, seed=3)
    torch.testing.assert_close(rebuilt(found), expected, rtol=0, atol=1e-12)
    residual = torch.linalg.eigvalsh(C - rebuilt(found))
    assert residual.min() > -1e-12, "it lies below C"


@pytest.mark.parametrize("rank", [5, 9, 40, 100])
def test_a_map_of_no_more_than_its_rank_is_recovered(rank):
    C = positive([5.0, 2.0, 1.0, 0.1, 0.01] + [0.0] * 35)
    vectors, values = found = nystroem_approximation(lambda v: C @ v, 40, rank)
    torch.testing.assert_close(rebuilt(found), C, rtol=0, atol=1e-11)
    expected = torch.linalg.eigvalsh(C).flip(0).clamp(min=0)[: len(values)]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-11)
    assert vectors.shape == (40, min(rank, 40))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(min(rank, 40), dtype=torch.float64), rtol=0, atol=1e-12)


def test_vectors_are_orthonormal_and_values_fall_and_are_not_negative():
    vectors, values = nystroem_approximation(lambda v: positive(SPECTRA["steep"]) @ v, 40, 40)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (values[:-1] >= values[1:]).all()
    assert values[-1] >= 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_float32_it_is_as_near_as_float32_allows(seed):
    C = positive(SPECTRA["steep"], seed)
    vectors, values = found = nystroem_approximation(lambda v: C.float() @ v, 40, 20, seed, torch.float32)
    assert vectors.dtype == torch.float32
    assert values.dtype == torch.float64
    exact = nystroem_approximation(lambda v: C @ v, 40, 20, seed)
    torch.testing.assert_close(rebuilt(found), rebuilt(exact), rtol=0, atol=2e-5)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(20), rtol=0, atol=1e-5)


def test_one_product_makes_it_and_the_seed_alone_decides():
    C, calls = positive(SPECTRA["falling"]), []

    def apply(v):
        calls.append(v.shape)
        return C @ v

    one = nystroem_approximation(apply, 40, 6, seed=1)
    assert calls == [(40, 6)]
    torch.rand(3)
    again = nystroem_approximation(apply, 40, 6, seed=1)
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.allclose(rebuilt(one), rebuilt(nystroem_approximation(apply, 40, 6, seed=2)))


def test_a_zero_map_has_zero_eigenvalues():
    vectors, values = nystroem_approximation(torch.zeros_like, 12, 4)
    assert (values == 0).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4, dtype=torch.float64))


def test_a_scale_of_the_map_is_a_scale_of_the_values():
    C = positive(SPECTRA["falling"])
    one = nystroem_approximation(lambda v: C @ v, 40, 10)
    for factor in (1e-120, 1e-12, 1e12):
        other = nystroem_approximation(lambda v, factor=factor: factor * (C @ v), 40, 10)
        torch.testing.assert_close(other[1] / factor, one[1], rtol=1e-6, atol=1e-14)


def test_a_map_with_negative_eigenvalues_is_refused_with_the_remedy():
    C = positive([1.0] * 10 + [-0.5] * 10)
    with pytest.raises(SolverError, match="Arnoldi"):
        nystroem_approximation(lambda v: C @ v, 20, 15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_that_are_not_finite_are_refused(bad):
    with pytest.raises(SolverError, match="not finite"):
        nystroem_approximation(lambda v: v * bad, 9, 3)
