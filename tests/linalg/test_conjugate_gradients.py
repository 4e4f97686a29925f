"""Per-column and block conjugate gradients against dense float64 solves, and where there is nothing to solve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import SolverError
from refluence.linalg import block_conjugate_gradient, conjugate_gradient

METHODS = {"columns": conjugate_gradient, "block": block_conjugate_gradient}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(eigenvalues, seed=0):
    basis = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    return (basis * torch.as_tensor(eigenvalues, dtype=torch.float64)) @ basis.T


class Map:
    """A dense matrix that counts the columns it is multiplied with."""

    def __init__(self, dense):
        self.dense, self.columns, self.calls = dense, [], 0

    def __call__(self, vectors):
        self.calls += 1
        self.columns.append(vectors.shape[1])
        return self.dense @ vectors


def relative_residual(A, x, b):
    residual = (b.double() - A.double() @ x.double()).norm(dim=0)
    return torch.where(b.norm(dim=0) > 0, residual / b.double().norm(dim=0), 0.0)


@methods
@pytest.mark.parametrize("k", [1, 5, 70])
@pytest.mark.parametrize(("decades", "d", "rtol"), [(2, 40, 1e-10), (4, 60, 1e-10), (6, 30, 1e-8), (8, 20, 1e-6)])
def test_equals_the_dense_solve(method, decades, d, rtol, k):
    A, b = matrix(torch.logspace(0, -decades, d)), normal(d, k, seed=1)
    found = method(Map(A), b, rtol, 0.0, 5000)
    assert found.converged.all()
    torch.testing.assert_close(found.residual, relative_residual(A, found.value, b), rtol=1e-3, atol=1e-9)
    assert (found.residual <= rtol).all()
    # ‖x − A⁻¹b‖ ≤ ‖A⁻¹‖ ‖b − Ax‖
    errors = (found.value - torch.linalg.solve(A, b)).norm(dim=0)
    assert (errors <= 1.01 * 10**decades * rtol * b.norm(dim=0)).all()


@methods
def test_right_hand_sides_of_any_layout(method):
    A, b = matrix(torch.logspace(0, -2, 20)), normal(40, 12, seed=1)[::2, ::3]
    expected = torch.linalg.solve(A, b)
    for right in (b, b.contiguous(), b.T.contiguous().T):
        torch.testing.assert_close(method(Map(A), right, 1e-12, 0.0, 500).value, expected, rtol=1e-8, atol=1e-8)


@methods
def test_zero_duplicate_and_dependent_columns(method):
    A, b = matrix(torch.logspace(0, -3, 30)), normal(30, 8, seed=1)
    b[:, 0], b[:, 2], b[:, 3] = 0, b[:, 1], 2 * b[:, 4] - b[:, 5]
    found = method(Map(A), b, 1e-10, 0.0, 500)
    assert found.converged.all()
    assert (found.value[:, 0] == 0).all()
    assert found.residual[0] == found.iterations[0] == 0
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-6)


@methods
def test_nothing_to_solve(method):
    A = matrix(torch.logspace(0, -3, 5))
    for b in (torch.zeros(5, 3, dtype=torch.float64), torch.zeros(5, 0, dtype=torch.float64)):
        found = method(Map(A), b, 1e-10, 0.0, 500)
        assert (found.value == 0).all()
        assert found.converged.all()


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_of_very_different_scale(method, dtype):
    A, b = matrix(torch.logspace(0, -2, 25)).to(dtype), normal(25, 6, seed=1)
    scales = torch.tensor([1e-30, 1e-12, 1.0, 1e5, 1e12, 1e30], dtype=torch.float64)
    found = method(Map(A), (b * scales).to(dtype), 1e-4, 0.0, 500)
    assert found.converged.all()
    plain = method(Map(A), b.to(dtype), 1e-4, 0.0, 500).value.double()
    torch.testing.assert_close(found.value.double() / scales, plain, rtol=1e-3, atol=1e-3)


@methods
def test_absolute_tolerance_holds_for_each_column(method):
    A, b = matrix(torch.logspace(0, -3, 40)), normal(40, 4, seed=1) * torch.tensor([1.0, 10.0, 1e-3, 1e3]).double()
    found = method(Map(A), b, 0.0, 1e-2, 500)
    assert found.converged.all()
    residual = (b - A @ found.value).norm(dim=0)
    assert (residual <= 1e-2).all()
    if method is conjugate_gradient:  # a tolerance that is met is not met again
        assert (residual >= 1e-4).all()
    both = method(Map(A), b, 1e-3, 1e-2, 500)
    assert ((b - A @ both.value).norm(dim=0) <= (1e-3 * b.norm(dim=0)).clamp_min(1e-2)).all()


@methods
def test_singular_with_a_solution(method):
    A = matrix([0.0, 0.0, 0.0, *torch.logspace(0, -2, 17).tolist()])
    b = A @ normal(20, 4, seed=1)
    found = method(Map(A), b, 1e-9, 0.0, 200)
    assert found.converged.all()
    torch.testing.assert_close(found.value, torch.linalg.pinv(A, rtol=1e-8) @ b, rtol=1e-5, atol=1e-5)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_singular_without_a_solution_is_reported(method, dtype, k):
    A = matrix([0.0, 0.0, *torch.logspace(0, -2, 18).tolist()]).to(dtype)
    b = normal(20, k, seed=1).to(dtype)
    solvable = A @ b[:, 0]
    b[:, 0] = solvable
    product = Map(A)
    found = method(product, b, 1e-4, 0.0, 300)
    assert found.converged[0]
    assert not found.converged[1:].any()
    torch.testing.assert_close(found.residual, relative_residual(A, found.value, b), rtol=0.05, atol=1e-3)
    assert product.calls < 300


@methods
def test_no_curvature_at_all(method):
    found = method(torch.zeros_like, normal(6, 2), 1e-4, 0.0, 50)
    assert not found.converged.any()
    assert (found.value == 0).all()
    torch.testing.assert_close(found.residual, torch.ones(2, dtype=torch.float64))


@methods
@pytest.mark.parametrize("damping", [1e-6, 1e-9])
def test_tiny_damping_of_a_singular_matrix(method, damping):
    A = matrix([0.0, 0.0, 0.0, *torch.logspace(0, -2, 17).tolist()]) + damping * torch.eye(20, dtype=torch.float64)
    b = normal(20, 3, seed=1)
    found = method(Map(A), b, 1e-6, 0.0, 500)
    assert found.converged.all()
    expected = torch.linalg.solve(A, b)
    torch.testing.assert_close(damping * found.value, damping * expected, rtol=1e-4, atol=1e-5)


@methods
@pytest.mark.parametrize("decades", [1, 3])
def test_tolerance_below_the_rounding_is_reported(method, decades):
    A, b = matrix(torch.logspace(0, -decades, 40)).float(), normal(40, 5, seed=1).float()
    product = Map(A)
    found = method(product, b, 1e-13, 0.0, 3000)
    assert not found.converged.any()
    assert product.calls < 3000
    torch.testing.assert_close(found.residual, relative_residual(A, found.value, b), rtol=0.5, atol=1e-6)
    assert (found.residual < 10**decades * 1e-5).all()


@methods
def test_maxiter_is_reported_with_the_true_residual(method):
    A, b = matrix(torch.logspace(0, -4, 60)), normal(60, 3, seed=1)
    product = Map(A)
    found = method(product, b, 1e-10, 0.0, 4)
    assert (found.iterations == 4).all()
    assert product.calls == 5  # the last for the residual
    assert not found.converged.any()
    torch.testing.assert_close(found.residual, relative_residual(A, found.value, b))
    zero = method(product, b, 1e-10, 0.0, 0)
    assert (zero.value == 0).all()
    torch.testing.assert_close(zero.residual, torch.ones(3, dtype=torch.float64))


@methods
def test_finite_termination(method):
    """As many distinct eigenvalues as steps."""
    A = matrix([1.0] * 12 + [2.0] * 6 + [5.0] * 7)
    found = method(Map(A), normal(25, 4, seed=1), 1e-10, 0.0, 100)
    assert found.converged.all()
    assert found.iterations.max() <= 3
    d = 12
    found = method(Map(matrix(torch.linspace(1, 5, d))), normal(d, 4, seed=1), 1e-10, 0.0, 100)
    assert found.iterations.max() <= d


def test_the_block_needs_d_over_k_steps_where_columns_need_d():
    A, b = matrix(torch.logspace(0, -3, 60)), normal(60, 15, seed=1)
    block, columns = block_conjugate_gradient(Map(A), b, 1e-8, 0.0, 500), conjugate_gradient(Map(A), b, 1e-8, 0.0, 500)
    assert block.iterations.max() <= 60 // 15 + 2
    assert columns.iterations.max() > 40


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(2, 40), k=st.integers(1, 12), decades=st.floats(0.5, 4))
def test_the_block_takes_no_more_steps_than_the_slowest_column(seed, d, k, decades):
    A, b = matrix(torch.logspace(0, -decades, d), seed), normal(d, k, seed=seed + 1)
    block, columns = (
        block_conjugate_gradient(Map(A), b, 1e-6, 0.0, 2000),
        conjugate_gradient(Map(A), b, 1e-6, 0.0, 2000),
    )
    assert block.converged.all()
    # Both minimise the error in the norm of A, not the residual that stops them, and beyond d steps rounding decides.
    assert block.iterations.max() <= 1.1 * columns.iterations.max() + 1


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6), exponents=st.lists(st.integers(-20, 20), min_size=4, max_size=4), block=st.booleans()
)
def test_scale_and_order_of_columns_do_not_matter(seed, exponents, block):
    method = METHODS["block" if block else "columns"]
    A, b = matrix(torch.logspace(0, -2, 15), seed), normal(15, 4, seed=seed + 1)
    plain = method(Map(A), b, 1e-9, 0.0, 200).value
    scales, order = torch.tensor([2.0**e for e in exponents], dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(method(Map(A), b * scales, 1e-9, 0.0, 200).value / scales, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(method(Map(A), b[:, order], 1e-9, 0.0, 200).value, plain[:, order], rtol=1e-6, atol=1e-6)


@methods
def test_converged_columns_leave_the_products(method):
    A = matrix([1.0] * 20 + torch.logspace(0, -3, 20).tolist())
    b = normal(40, 3, seed=1)
    vectors = torch.linalg.eigh(A)[1]
    b[:, 1:] = vectors[:, -5:] @ normal(5, 2, seed=2)
    product = Map(A)
    found = method(product, b, 1e-6, 0.0, 500)
    assert found.converged.all()
    assert found.iterations[1:].max() < 5 < found.iterations[0]
    assert set(product.columns[6:]) == {1}


@methods
def test_a_preconditioner_saves_steps_and_keeps_the_answer(method):
    scales = torch.logspace(0, 4, 50, dtype=torch.float64)
    A = torch.diag(scales) + 0.1 * matrix(torch.linspace(0.1, 1, 50))
    b = normal(50, 2, seed=1)
    plain = method(Map(A), b, 1e-10, 0.0, 5000)
    better = method(Map(A), b, 1e-10, 0.0, 5000, precondition=lambda r: r / A.diagonal()[:, None])
    assert better.converged.all()
    assert better.iterations.max() * 2 <= plain.iterations.max()
    torch.testing.assert_close(better.value, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-9)


@methods
@pytest.mark.parametrize("k", [1, 3])
def test_negative_curvature_is_an_error_with_the_remedy(method, k):
    A = matrix([-0.5, *torch.linspace(0.5, 1, 19).tolist()])
    with pytest.raises(SolverError, match=r"negative curvature: pᵀAp/pᵀp = -.*raise the damping.*ggn") as caught:
        method(Map(A), normal(20, k, seed=1), 1e-8, 0.0, 100)
    found = float(str(caught.value).split("pᵀp = ")[1].split(" ")[0])
    assert -0.51 <= found < 0
    assert method(Map(A + 0.6 * torch.eye(20).double()), normal(20, k, seed=1), 1e-8, 0.0, 100).converged.all()


@methods
def test_rounding_is_not_taken_for_negative_curvature(method):
    rows = normal(8, 40).float()
    found = method(lambda v: rows.T @ (rows @ v), normal(40, 4, seed=1).float(), 1e-5, 0.0, 200)
    assert not found.converged.any()


@methods
def test_a_preconditioner_that_is_not_positive_is_an_error(method):
    with pytest.raises(SolverError, match="preconditioner is not positive definite"):
        method(Map(matrix([1.0, 2.0])), normal(2, 1), 1e-6, 0.0, 10, precondition=lambda r: -r)


@methods
def test_values_that_are_not_finite_are_errors(method):
    b = normal(4, 3)
    with pytest.raises(SolverError, match="product"):
        method(lambda v: v * float("nan"), b, 1e-6, 0.0, 10)
    b[1, 2] = float("inf")
    with pytest.raises(SolverError, match="right-hand side 2"):
        method(lambda v: v, b, 1e-6, 0.0, 10)
    with pytest.raises(SolverError, match="rtol=-1"):
        method(lambda v: v, normal(4, 3), -1.0, 0.0, 10)


@methods
def test_a_recursive_residual_that_lies_is_found_out(method):
    """A map whose first products are wrong: the recursion believes it has converged, the true residual says no."""
    A, b = matrix(torch.linspace(1, 3, 10)), normal(10, 2, seed=1)
    product = Map(A)

    def apply(vectors):
        return product(vectors) * (1.05 if product.calls < 3 else 1.0)

    found = method(apply, b, 1e-9, 0.0, 100)
    assert found.converged.all()
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-7)


@methods
def test_steps_are_reported(method):
    seen = []
    A = matrix(torch.linspace(1, 3, 10))
    found = method(Map(A), normal(10, 2), 1e-8, 0.0, 50, on_step=lambda step, residual: seen.append((step, residual)))
    assert [step for step, _ in seen] == list(range(1, int(found.iterations.max()) + 1))
    assert seen[-1][1] <= 1e-8 < seen[0][1]


@methods
def test_a_caller_that_measures_itself_saves_the_check(method):
    A, b = matrix(torch.logspace(0, -2, 30)), normal(30, 3, seed=1)
    product = Map(A)
    found = method(product, b, 1e-8, 0.0, 200, measured=False)
    assert product.calls == found.iterations.max()
    assert found.converged.all()
    torch.testing.assert_close(found.residual, relative_residual(A, found.value, b), rtol=0.1, atol=1e-12)
