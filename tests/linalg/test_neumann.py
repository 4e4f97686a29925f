"""The Neumann recursion against the dense inverse, its truncation and its divergence."""

import pytest
import torch

from refluence.errors import SolverError
from refluence.linalg.lanczos import spectral_bounds
from refluence.linalg.neumann import neumann_depth, neumann_solve


def symmetric(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (vectors * values) @ vectors.T


D = 20
VALUES = [1.3**-i + 0.1 for i in range(D)]


def right_hand_sides(k=50):
    return torch.randn(D, k, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.7, 1.2, 5.0])
@pytest.mark.parametrize("depth", [0, 1, 7, 40])
def test_it_is_the_truncated_series(scale, depth):
    A, V = symmetric(VALUES), right_hand_sides()
    step, total, power = torch.eye(D).double() - A / scale, torch.zeros(D, D).double(), torch.eye(D).double()
    for _ in range(depth + 1):
        total, power = total + power, power @ step
    torch.testing.assert_close(neumann_solve(lambda v: A @ v, V, scale, depth), total @ V / scale)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-6])
def test_the_depth_keeps_every_component_within_the_tolerance(tolerance):
    A, V = symmetric(VALUES), right_hand_sides()
    scale = spectral_bounds(lambda v: A @ v, D)[1]
    low = float(torch.linalg.eigvalsh(A)[0])
    depth = neumann_depth(low, scale, tolerance)
    found = neumann_solve(lambda v: A @ v, V, scale, depth)
    exact = torch.linalg.solve(A, V)
    vectors = torch.linalg.eigh(A).eigenvectors
    short = (vectors.T @ (exact - found)) / (vectors.T @ exact)
    assert short.abs().max() <= tolerance * (1 + 1e-6)
    assert (1 - low / scale) ** depth > tolerance, "a step fewer would not do"


def test_more_right_hand_sides_than_dimensions_zero_ones_and_any_strides():
    A, V = symmetric(VALUES), right_hand_sides(3 * D)
    V[:, 5] = 0
    found = neumann_solve(lambda v: A @ v, V, 1.2, 300)
    torch.testing.assert_close(found, torch.linalg.solve(A, V))
    assert (found[:, 5] == 0).all()
    transposed = V.T.contiguous().T
    kept = transposed.clone()
    again = neumann_solve(lambda v: A @ v, transposed, 1.2, 300)
    torch.testing.assert_close(again, found)
    assert again.T.is_contiguous()
    assert torch.equal(transposed, kept), "the right-hand sides are the caller's"


def test_divergence_is_found_early_and_the_scale_named_works():
    A, V = symmetric(VALUES), right_hand_sides()
    calls = []

    def apply(v):
        calls.append(1)
        return A @ v

    with pytest.raises(SolverError, match="use a scale of at least") as error:
        neumann_solve(apply, V, 0.1, 100_000)
    assert len(calls) < 50
    scale = float(str(error.value).split("damping is ")[1].split(":")[0])
    torch.testing.assert_close(neumann_solve(lambda v: A @ v, V, scale, 500), torch.linalg.solve(A, V))


def test_a_negative_eigenvalue_diverges_at_every_scale_and_the_message_says_so():
    A = symmetric([1.0, 0.5, -0.3] + [0.2] * (D - 3))
    with pytest.raises(SolverError, match="no scale works"):
        neumann_solve(lambda v: A @ v, right_hand_sides(), 2.0, 5_000)


def test_nan_is_divergence():
    with pytest.raises(SolverError, match="diverges within 4"):
        neumann_solve(lambda v: v * float("nan"), right_hand_sides(), 1.0, 50, remedy=lambda: "look")


def test_the_recursion_that_only_just_converges_is_not_called_divergent():
    A = symmetric([1.999] + [1e-9] * (D - 1))
    neumann_solve(lambda v: A @ v, right_hand_sides(), 1.0, 2_000)


def test_float32():
    A, V = symmetric(VALUES), right_hand_sides()
    found = neumann_solve(lambda v: A.float() @ v, V.float(), 1.2, 300)
    torch.testing.assert_close(found.double(), torch.linalg.solve(A, V), rtol=1e-4, atol=1e-4)
