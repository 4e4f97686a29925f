"""Sketches P_A ⊗ P_E of A ⊗ E."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import RefluenceError
from refluence.theory import (
    distortion,
    effective_dimension,
    factor_dampings,
    factor_dimensions,
    kronecker_dimension,
    kronecker_distortion,
    lost_dimensions,
)

few = settings(max_examples=40, deadline=None, derandomize=True)
spectra = st.lists(st.floats(1e-3, 1e2), min_size=1, max_size=8)


def test_each_factor_is_damped_in_its_own_units():
    assert factor_dampings([4.0, 1.0], [0.5, 0.1], 0.2) == pytest.approx((0.4, 0.05))
    assert factor_dimensions([4.0, 1.0], [0.5, 0.1], 0.2) == pytest.approx((4 / 4.4 + 1 / 1.4, 0.5 / 0.55 + 0.1 / 0.15))


@few
@given(a=spectra, e=spectra, damping=st.floats(1e-3, 1e2))
def test_the_kronecker_dimension_is_that_of_the_product(a, e, damping):
    matrix = torch.kron(torch.diag(torch.tensor(a)), torch.diag(torch.tensor(e))).double()
    expected = effective_dimension(matrix.diagonal(), damping)
    assert kronecker_dimension(a, e, damping) == pytest.approx(expected, rel=1e-5)
    assert kronecker_dimension(a, e, damping) == pytest.approx(kronecker_dimension(e, a, damping), rel=1e-12)


@few
@given(a=spectra, e=spectra, share=st.floats(1e-6, 1.0))
def test_the_product_of_the_factors_dimensions_is_no_less_than_a_third_of_the_dimension(a, e, share):
    damping = share * max(a) * max(e)
    left, right = factor_dimensions(a, e, damping)
    assert left * right >= kronecker_dimension(a, e, damping) / 3 * (1 - 1e-12)


def factor(size: int, decay: float, generator: torch.Generator) -> torch.Tensor:
    Q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    return Q * torch.logspace(0.5, -decay, size, dtype=torch.float64) @ Q.T


def root(M: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(M)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@few
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(4, 200), st.integers(4, 200)),
    decay=st.floats(0.0, 3.0),
    ratio=st.floats(1e-4, 5.0),
)
def test_the_distortion_of_a_factorised_sketch_is_bounded_by_those_of_its_factors(seed, sizes, decay, ratio):
    generator = torch.Generator().manual_seed(seed)
    A, E = factor(5, decay, generator), factor(4, decay, generator)
    damping = ratio * float(torch.linalg.matrix_norm(A, 2) * torch.linalg.matrix_norm(E, 2))
    dampings = factor_dampings(torch.linalg.eigvalsh(A), torch.linalg.eigvalsh(E), damping)
    sketched = []
    for M, m in ((A, sizes[0]), (E, sizes[1])):
        P = torch.randn(m, len(M), dtype=torch.float64, generator=generator) / m**0.5
        sketched.append(root(M) @ P.T @ P @ root(M))
    epsilon = max(
        float(distortion(M, S, damped).abs().max()) for M, S, damped in zip((A, E), sketched, dampings, strict=True)
    )
    whole = distortion(torch.kron(A, E), torch.kron(*sketched), damping)
    assert float(whole.abs().max()) <= kronecker_distortion(epsilon, ratio) * (1 + 1e-9) + 1e-12


def test_the_bound_by_hand():
    assert kronecker_distortion(0.1) == pytest.approx(0.23)
    assert kronecker_distortion(0.1, ratio=0.5) == kronecker_distortion(0.1)
    assert kronecker_distortion(0.1, ratio=3.0) == pytest.approx(0.25)
    with pytest.raises(RefluenceError, match=r"must be ≥ 0, not -0\.1"):
        kronecker_distortion(-0.1)


def test_ranks_of_factorised_sketches_multiply():
    """Exact at λ = 0 if and only if each factor is: three dimensions of A lose one, two of E none."""
    generator = torch.Generator().manual_seed(0)
    P_a, P_e = (torch.randn(m, r, dtype=torch.float64, generator=generator) for m, r in ((2, 3), (4, 2)))
    assert lost_dimensions(P_a, 3) == 1
    assert lost_dimensions(P_e, 2) == 0
    assert lost_dimensions(torch.kron(P_a, P_e), 6) == 2


def test_a_factor_that_is_zero_is_named():
    with pytest.raises(RefluenceError, match="the factor E is 0"):
        factor_dampings([1.0], np.zeros(2), 0.1)
    with pytest.raises(RefluenceError, match="≥ 0, not -1"):
        factor_dampings([1.0], [1.0], -1)
