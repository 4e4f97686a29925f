"""Stochastic Lanczos quadrature against vᵀf(C)v of its own probes and against the trace."""

import pytest
import torch

from refluence.linalg.lanczos import lanczos
from refluence.linalg.quadrature import gauss_rules, sign_columns, spectral_quadrature


def symmetric(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return (vectors * values) @ vectors.T


def function_of(C, f):
    values, vectors = torch.linalg.eigh(C)
    return (vectors * f(values)) @ vectors.T


D = 24
POSITIVE = {
    "falling": [1.4**-i for i in range(D)],
    "repeated": [3.0] * 8 + [0.5] * 9 + [0.01] * 7,
    "regular": [1.0 + 0.1 * i for i in range(D)],
}
FUNCTIONS = {
    "shrinkage": lambda s: s / (s + 1e-2),
    "inverse": lambda s: 1 / s,
    "log": torch.log,
    "one": torch.ones_like,
}


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
def test_each_probe_is_exact_once_its_krylov_space_ends(name, f):
    C = symmetric(POSITIVE[name])
    nodes, weights = spectral_quadrature(lambda v: C @ v, D, probes=5, steps=D, seed=2)
    Z = sign_columns(D, 5, 2, torch.float64, "cpu")
    exact = (Z * (function_of(C, f) @ Z)).sum(dim=0)
    found = (weights * f(nodes)).sum(dim=1) * 5
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


def test_few_steps_are_exact_for_polynomials():
    C = symmetric([(-1.1) ** -i for i in range(D)])
    nodes, weights = spectral_quadrature(lambda v: C @ v, D, probes=3, steps=4, seed=0)
    Z = sign_columns(D, 3, 0, torch.float64, "cpu")
    for power in range(8):
        exact = (Z * (torch.linalg.matrix_power(C, power) @ Z)).sum(dim=0)
        torch.testing.assert_close((weights * nodes**power).sum(dim=1) * 3, exact)


def test_the_estimate_is_unbiased_over_probes():
    """z-test of 4000 probes against the trace."""
    C = symmetric(POSITIVE["falling"])
    nodes, weights = spectral_quadrature(lambda v: C @ v, D, probes=4000, steps=D, seed=5)
    each = (weights * FUNCTIONS["shrinkage"](nodes)).sum(dim=1) * 4000
    trace = FUNCTIONS["shrinkage"](torch.linalg.eigvalsh(C)).sum()
    assert abs(each.mean() - trace) < 4 * each.std() / 4000**0.5
    assert each.std() / 4000**0.5 < 0.05 * trace


def test_zero_eigenvalues_and_early_ends_put_no_weight_where_there_is_none():
    """Grades 1, 3 and 6 together; the function is infinite at 0."""
    C = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64))
    V = torch.zeros(6, 3, dtype=torch.float64)
    V[4, 0], V[:3, 1], V[:, 2] = 2.0, 1.0, 1.0
    nodes, weights = gauss_rules(lanczos(lambda v: C @ v, V, 6))
    assert torch.isfinite(1 / nodes).all()
    exact = (V * torch.linalg.solve(C, V)).sum(dim=0) / V.square().sum(dim=0)
    torch.testing.assert_close((weights / nodes).sum(dim=1), exact)


def test_a_singular_map_keeps_its_weight_at_zero():
    C = symmetric([1.0] * 4 + [0.0] * 20)
    nodes, weights = spectral_quadrature(lambda v: C @ v, D, probes=2, steps=D)
    torch.testing.assert_close(weights.sum(), torch.tensor(float(D)).double())
    Z = sign_columns(D, 2, 0, torch.float64, "cpu")
    torch.testing.assert_close((weights * nodes).sum(dim=1) * 2, (Z * (C @ Z)).sum(dim=0))
    assert (weights[nodes.abs() < 1e-12].sum() > 0).all()


def test_one_product_a_step_serves_all_probes():
    C, calls = symmetric(POSITIVE["regular"]), []

    def apply(v):
        calls.append(tuple(v.shape))
        return C @ v

    spectral_quadrature(apply, D, probes=7, steps=5)
    assert calls == [(D, 7)] * 5


def test_float32_agrees_with_float64():
    C = symmetric(POSITIVE["falling"])
    one = spectral_quadrature(lambda v: C @ v, D, probes=4, steps=12)
    other = spectral_quadrature(lambda v: C.float() @ v, D, probes=4, steps=12, dtype=torch.float32)
    values = [(w * FUNCTIONS["shrinkage"](s)).sum() for s, w in (one, other)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=0)
