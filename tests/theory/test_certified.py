"""The certain bound is its formula, computed among the parameters; it holds where the sketch has another damping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refluence.errors import RefluenceError
from refluence.theory import distortion, distortion_factor
from refluence.theory.certified import RIDGES, certain_bounds
from support.reference import bilinear, curvature

N, K, D = 9, 4, 16
few = settings(max_examples=25, deadline=None, derandomize=True)


def problem(seed, m, weighted=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = torch.logspace(0, -1.5, D, dtype=torch.float64)
    G, V, P = normal(N, D) * scales, normal(K, D) * scales, normal(m, D) / m**0.5
    return G, V, P, torch.rand(N, generator=generator, dtype=torch.float64) + 0.2 if weighted else None


def found(G, V, P, target, damping, weights=None):
    roots = None if weights is None else weights.sqrt()
    rows = G if roots is None else G * roots[:, None]
    norms = V.square().sum(dim=1)
    return certain_bounds(rows @ rows.T / N, rows @ P.T, rows @ V.T, V @ P.T, norms, target, damping, roots)


def power(C, exponent):
    values, vectors = torch.linalg.eigh(C)
    kept = values > 1e-12 * values.max()
    return (vectors[:, kept] * values[kept] ** exponent) @ vectors[:, kept].T


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize(("target", "damping"), [(0.1, 0.1), (0.1, 0.03)])
def test_it_is_the_formula_among_the_parameters(weighted, m, target, damping):
    G, V, P, weights = problem(1, m, weighted)
    C, eye = curvature(G, weights), torch.eye(D, dtype=torch.float64)
    train = G if weights is None else G * weights[:, None]
    whole, half = torch.linalg.inv(C + target * eye), power(C, 0.5)
    # Over vectors u with g = C^{1/2}u: the error is uᵀ[κ(C+κ)⁻¹ − μ(F̃+μ)⁻¹]u', the gap κuᵀ(C+κ)⁻¹u.
    error = target * whole - damping * torch.linalg.inv(half @ P.T @ P @ half + damping * eye)
    inverse_root = torch.linalg.inv(power(target * whole, 0.5))
    span = power(C, 0.5) @ power(C, -0.5)
    factor = torch.linalg.eigvalsh(inverse_root @ span @ error @ span @ inverse_root).abs().max()

    def gap(rows):
        u = rows @ power(C, -0.5)
        return target * (u @ whole * u).sum(dim=1)

    solved = torch.linalg.solve(P @ C @ P.T + damping * torch.eye(m, dtype=torch.float64), P @ train.T)
    expected = torch.full((K, N), torch.inf, dtype=torch.float64)
    for ridge in (0.0, *(share * target for share in RIDGES)):
        inside = V @ C @ (power(C, -1.0) if ridge == 0 else torch.linalg.inv(C + ridge * eye))
        rest = V - inside
        bound = factor * (gap(inside)[:, None] * gap(train)).sqrt()
        bound += (rest @ P.T).norm(dim=1)[:, None] * solved.norm(dim=0) + (rest @ whole @ train.T).abs()
        expected = torch.minimum(expected, bound)
        if ridge == 0:
            outside, leaked = rest.norm(dim=1), rest @ P.T @ solved
    bounds = found(G, V, P, target, damping, weights)
    assert bounds.factor == pytest.approx(float(factor), rel=1e-8)
    torch.testing.assert_close(bounds.values, expected, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(bounds.outside.sqrt(), outside, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bounds.leaked, leaked.square().mean(dim=1), rtol=1e-6, atol=1e-12)
    predicted = outside.square() * solved.square().sum(dim=0).mean() / m
    torch.testing.assert_close(bounds.expected, predicted, rtol=1e-6, atol=1e-12)


@few
@given(seed=st.integers(0, 10**6), m=st.integers(1, 60), target=st.floats(1e-3, 10.0), share=st.floats(0.05, 1.0))
def test_no_error_exceeds_it(seed, m, target, share):
    G, V, P, weights = problem(seed, m, weighted=True)
    C, train = curvature(G, weights), G * weights[:, None]
    exact = bilinear(V, train, C, target)
    scores = bilinear(V @ P.T, train @ P.T, P @ C @ P.T, share * target)
    assert ((scores - exact).abs() <= found(G, V, P, target, share * target, weights).values * (1 + 1e-8) + 1e-12).all()


def test_at_another_damping_nothing_but_the_damping_is_distorted_by_a_perfect_sketch():
    K = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    delta = distortion(K, K, 1.0, 0.5)
    assert delta.tolist() == pytest.approx([-0.5, -0.25, -0.1])
    assert distortion_factor(delta, 0.5) == pytest.approx(max(abs(1 - 0.5 / (1 + d)) for d in (-0.5, -0.25, -0.1)))
    with pytest.raises(RefluenceError, match="damping must be > 0"):
        distortion(K, K, 1.0, 0.0)
