"""Rounds in float32 reach tolerances that float32 has not; what cannot be reached is reported."""

import pytest
import torch

from refluence.linalg import block_conjugate_gradient, conjugate_gradient
from refluence.linalg.refinement import refined_solve

methods = pytest.mark.parametrize("method", [conjugate_gradient, block_conjugate_gradient])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(eigenvalues):
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues)))[0]
    return (basis * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ basis.T


class Mixed:
    """A in the dtype of the vectors, counting the columns of each."""

    def __init__(self, A):
        self.A, self.columns = A, {torch.float32: 0, torch.float64: 0}

    def __call__(self, vectors):
        self.columns[vectors.dtype] += vectors.shape[1]
        return self.A.to(vectors.dtype) @ vectors


@methods
@pytest.mark.parametrize(("decades", "rtol"), [(1, 1e-6), (3, 1e-6), (3, 1e-12), (5, 1e-9)])
def test_meets_the_tolerance_in_float64(method, decades, rtol):
    A, b = matrix(torch.logspace(0, -decades, 40)), normal(40, 6, seed=1)
    b[:, 3] = 0
    product = Mixed(A)
    found = refined_solve(method, product, b, rtol, 0.0, 4000)
    assert found.converged.all()
    used = [0, 1, 2, 4, 5]
    residual = (b - A @ found.value).norm(dim=0)[used] / b.norm(dim=0)[used]
    assert (residual <= rtol).all()
    torch.testing.assert_close(found.residual[used], residual, rtol=1e-2, atol=1e-13)
    assert (found.value[:, 3] == 0).all()
    assert found.residual[3] == found.iterations[3] == 0
    if decades == 1:
        assert product.columns[torch.float64] <= 3 * 5 < product.columns[torch.float32]


@methods
def test_columns_of_any_scale_and_an_absolute_tolerance(method):
    A, scales = matrix(torch.logspace(0, -2, 30)), torch.tensor([1e-60, 1.0, 1e60], dtype=torch.float64)
    b = normal(30, 3, seed=1) * scales
    found = refined_solve(method, Mixed(A), b, 1e-8, 0.0, 500)
    assert found.converged.all()
    torch.testing.assert_close(found.value / scales, torch.linalg.solve(A, b / scales), rtol=1e-5, atol=1e-5)
    found = refined_solve(method, Mixed(A), b[:, :2], 0.0, 1e-9, 500)
    assert found.iterations[0] == 0
    assert ((b[:, :2] - A @ found.value).norm(dim=0) <= 1e-9).all()


@methods
def test_no_solution_and_too_few_steps_are_reported(method):
    A, b = matrix([0.0, 0.0, *torch.logspace(0, -2, 18).tolist()]), normal(20, 3, seed=1)
    found = refined_solve(method, Mixed(A), b, 1e-6, 0.0, 500)
    assert not found.converged.any()
    assert (found.residual <= 1).all()
    found = refined_solve(method, Mixed(matrix(torch.logspace(0, -4, 60))), normal(60, 3), 1e-8, 0.0, 5)
    assert not found.converged.any()
    assert (found.iterations == 5).all()


@methods
def test_for_a_loose_tolerance_few_columns_are_measured_in_float64(method):
    A, b = matrix(torch.logspace(0, -2, 60)), normal(60, 40, seed=1)
    b[:, 7] = 0
    product = Mixed(A)
    found = refined_solve(method, product, b, 1e-3, 0.0, 4000)
    lengths = b.norm(dim=0).clamp_min(1e-300)
    residual = (b - A @ found.value).norm(dim=0) / lengths
    assert found.converged.all()
    assert (residual <= found.residual).all()
    assert (found.residual <= 1e-3).all()
    assert found.residual[7] == 0
    assert product.columns[torch.float64] == 8


@methods
def test_where_float32_cannot_measure_a_loose_tolerance_float64_does(method):
    A, b = matrix(torch.logspace(0, -7, 40)), normal(40, 6, seed=1)
    product = Mixed(A)
    found = refined_solve(method, product, b, 1e-4, 0.0, 4000)
    residual = (b - A @ found.value).norm(dim=0) / b.norm(dim=0)
    assert found.converged.all()
    assert (residual <= 1e-4).all()
    assert product.columns[torch.float64] > 6


@methods
def test_a_loose_tolerance_that_is_missed_is_gone_on_with_and_not_begun_again(method):
    A, b = matrix(torch.logspace(0, -1, 60)), normal(60, 2, seed=1)
    found = refined_solve(method, Mixed(A), b, 1e-4, 0.0, 8)
    residual = (b - A @ found.value).norm(dim=0) / b.norm(dim=0)
    assert not found.converged.any()
    assert (found.iterations <= 8).all()
    assert (residual < 0.5).all()
    torch.testing.assert_close(found.residual, residual, rtol=1e-6, atol=0)
