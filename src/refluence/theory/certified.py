"""A bound on the error of every sketched score that holds for certain, from the exact Gram matrix and sketched rows.

Axis letters: n train and k test examples, m rows of the sketch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.theory.bounds import distortion, distortion_factor, pair_bounds
from refluence.theory.spectrum import numerical_rank

RIDGES = (1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""ρ over κ at which a test gradient is split into a part in the span and a rest: the least of their bounds holds."""


@dataclass(frozen=True, eq=False)
class CertainBounds:
    """What is certain of the error of every sketched score.

    Attributes:
        values: (k, n), |τ̃_ij − τ_ij| is at most this.
        factor: of `distortion_factor`.
        outside: ‖r_i‖², of the part of each test gradient outside the span of the train gradients.
        leaked: mean_j of the square of what the sketch made of it.
        expected: the same as a Gaussian sketch is expected to make it, ‖r_i‖²·mean_j ‖(PCPᵀ+μ)⁻¹Pg_j‖²/m.
    """

    values: Float64[Tensor, "k n"]
    factor: float
    outside: Float64[Tensor, " k"]
    leaked: Float64[Tensor, " k"]
    expected: Float64[Tensor, " k"]


def certain_bounds(
    gram: Float64[Tensor, "n n"],
    rows: Float64[Tensor, "n m"],
    across: Float64[Tensor, "n k"],
    tests: Float64[Tensor, "k m"],
    squared_norms: Float64[Tensor, " k"],
    target: float,
    damping: float,
    roots: Float64[Tensor, " n"] | None = None,
) -> CertainBounds:
    """|τ̃_ij − τ_ij| ≤ f·√gap_i·√gap_j + ‖Pr_i‖‖(PCPᵀ+μ)⁻¹Pg_j‖ + |τ_κ(r_i, g_j)|, the least over several splits.

    A test gradient is split as v = Gᵀ√W y + r into a part in the range of C, whose error the distortion bounds, and the
    rest, whose sketched score, the leakage, is bounded by Cauchy–Schwarz and whose exact score is known. With
    y = (K+ρ)⁻¹√WGv/n, r lies outside the span at ρ = 0 and is all of v at ρ = ∞; the bound holds for any y.

    Args:
        gram: K = √W GGᵀ √W/n.
        rows: √W G Pᵀ.
        across: √W G vᵀ.
        tests: Pv.
        squared_norms: ‖v‖².
        target: κ, the damping that the scores estimate.
        damping: μ, the damping on the sketch.
        roots: √w of the train examples, where they have weights: the train side of a score is w g.

    Raises:
        RefluenceError: a damping that is not positive.
    """
    n, m = rows.shape
    eye = torch.eye(n, dtype=torch.float64, device=gram.device)
    sketched = rows @ rows.T / n
    factor = distortion_factor(distortion(gram, sketched, target, damping), damping / target)
    values, vectors = torch.linalg.eigh(gram)
    inverse = (vectors / (values.clamp(min=0) + target)) @ vectors.T
    rank = numerical_rank(values.clamp(min=0))
    values, basis = values[n - rank :], vectors[:, n - rank :]
    along = basis.T @ across
    # (PCPᵀ+μ)⁻¹ P√W g_j by push-through.
    solved = torch.linalg.solve(sketched + damping * eye, rows)
    own = solved if roots is None else solved * roots[:, None]
    train_gaps, solved_norms = n * target * inverse.diagonal(), solved.norm(dim=1)
    best = torch.full((len(tests), n), torch.inf, dtype=torch.float64, device=gram.device)
    outside = leaked = expected = torch.zeros(len(tests), dtype=torch.float64, device=gram.device)
    for ridge in (0.0, *(share * target for share in RIDGES)):
        coefficients = basis @ (along / (n * (values + ridge))[:, None])
        inside = n * (gram @ coefficients)
        rest_rows = tests - coefficients.T @ rows
        test_gaps = n * target * (coefficients * (inverse @ coefficients)).sum(dim=0)
        bounds = pair_bounds(factor, test_gaps, train_gaps)
        bounds += rest_rows.norm(dim=1)[:, None] * solved_norms + (inverse @ (across - inside)).T.abs()
        best = torch.minimum(best, bounds)
        if ridge == 0:
            outside = (squared_norms - (coefficients * (2 * across - inside)).sum(dim=0)).clamp(min=0)
            leaked = (rest_rows @ own.T).square().mean(dim=1)
            expected = outside * own.square().sum(dim=1).mean() / m
    return CertainBounds(best if roots is None else best * roots, factor, outside, leaked, expected)
