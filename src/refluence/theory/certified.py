"""A bound on the error of every sketched score, from the exact and the sketched Gram matrix.

Axis letters: n train and k test examples, m rows of the sketch.

With g = C^½u, A = PC^½ and F̃ = AᵀA the sketched score at μ is τ̃ = uᵀ[I − μ(F̃+μ)⁻¹]u' and the exact one at κ is
τ = uᵀ[I − κ(C+κ)⁻¹]u', so that with Δ = (C+κ)^-½(F̃+μ−C−κ)(C+κ)^-½

    τ̃ − τ = κ uᵀ(C+κ)^-½ [I − (μ/κ)(I+Δ)⁻¹] (C+κ)^-½ u'  ≤  max_δ |1 − (μ/κ)/(1+δ)| · √gap(u) · √gap(u'),

gap(u) = κuᵀ(C+κ)⁻¹u = τ_0 − τ_κ. At μ = κ the factor is max |δ/(1+δ)|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.errors import RefluenceError
from refluence.theory.spectrum import numerical_rank

RIDGES = (1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""ρ over κ at which a test gradient is split into a part in the span and a rest: the least of their bounds holds."""


@dataclass(frozen=True, eq=False)
class CertainBounds:
    """What is certain of the error of every sketched score.

    Attributes:
        values: (k, n), |τ̃_ij − τ_ij| is at most this.
        factor: of `error_factor`.
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
    """`score_bounds` of every pair, the least over several splits of each test gradient.

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
    sketched = rows @ rows.T / n
    factor = error_factor(gram, sketched, target, damping)
    values, vectors = torch.linalg.eigh(gram)
    rank = numerical_rank(values.clamp(min=0))
    values, basis = values[n - rank :], vectors[:, n - rank :]
    along = basis.T @ across
    # (PCPᵀ+μ)⁻¹ P√W g_j by push-through.
    solved = torch.linalg.solve(_shifted(sketched, damping), rows)
    own = solved if roots is None else solved * roots[:, None]
    train_gaps, solved_norms = gaps(gram, None, target), solved.norm(dim=1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_shifted(gram, target)))
    best = torch.full((len(tests), n), torch.inf, dtype=torch.float64, device=gram.device)
    outside = leaked = expected = torch.zeros(len(tests), dtype=torch.float64, device=gram.device)
    for ridge in (0.0, *(share * target for share in RIDGES)):
        # v = Gᵀ√W y + r with y = (K+ρ)⁻¹(√W G v)/n; at ρ = 0 r is what lies outside the span.
        coefficients = basis @ (along / (n * (values + ridge))[:, None])
        inside = n * (gram @ coefficients)
        rest_rows = tests - coefficients.T @ rows
        test_gaps = n * target * (coefficients * (inverse @ coefficients)).sum(dim=0)
        rest_scores = (inverse @ (across - inside)).T
        bounds = score_bounds(factor, train_gaps, test_gaps, rest_rows.norm(dim=1), solved_norms, rest_scores)
        best = torch.minimum(best, bounds)
        if ridge == 0:
            outside = (squared_norms - (coefficients * (2 * across - inside)).sum(dim=0)).clamp(min=0)
            leaked = (rest_rows @ own.T).square().mean(dim=1)
            expected = outside * own.square().sum(dim=1).mean() / m
    return CertainBounds(best if roots is None else best * roots, factor, outside, leaked, expected)


def error_factor(
    gram: Float64[Tensor, "n n"], sketched: Float64[Tensor, "n n"], target: float, damping: float
) -> float:
    """max |1 − (μ/κ)/(1+δ)| over the generalised eigenvalues 1+δ of K̃ + μ against K + κ.

    Args:
        gram: K = √W GGᵀ √W/n of the train gradients.
        sketched: K̃, the same of the projected gradients.
        target: κ, the damping that the sketched scores estimate.
        damping: μ, the damping on the sketch; κ itself where the sketch is not corrected.

    Raises:
        RefluenceError: a damping that is not positive.
    """
    if not (target > 0 and damping > 0):
        raise RefluenceError(f"the bound needs dampings > 0, not κ = {target!r} and μ = {damping!r}")
    factor = torch.linalg.cholesky(_shifted(gram, target))
    whitened = torch.linalg.solve_triangular(factor, _shifted(sketched, damping), upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.T, upper=False)
    eigenvalues = torch.linalg.eigvalsh((whitened + whitened.T) / 2)
    ratio = damping / target
    return float(max(abs(1 - ratio / float(eigenvalues[0])), abs(1 - ratio / float(eigenvalues[-1]))))


def gaps(
    gram: Float64[Tensor, "n n"], coefficients: Float64[Tensor, "n k"] | None, target: float
) -> Float64[Tensor, " k"]:
    """τ_0 − τ_κ of the vectors Gᵀ√W y: nκ·yᵀ(K+κ)⁻¹y, for the columns y; of the train gradients where None."""
    n = len(gram)
    factor = torch.linalg.cholesky(_shifted(gram, target))
    if coefficients is None:
        return n * target * torch.cholesky_inverse(factor).diagonal()
    solved = torch.linalg.solve_triangular(factor, coefficients, upper=False)
    return n * target * solved.square().sum(dim=0)


def score_bounds(
    factor: float,
    train_gaps: Float64[Tensor, " n"],
    test_gaps: Float64[Tensor, " k"],
    rest_norms: Float64[Tensor, " k"],
    solved_norms: Float64[Tensor, " n"],
    rest_scores: Float64[Tensor, "k n"],
) -> Float64[Tensor, "k n"]:
    """|τ̃_ij − τ_ij| ≤ factor·√gap_i·√gap_j + ‖Pr_i‖‖(PCPᵀ+μ)⁻¹Pg_j‖ + |τ_κ(r_i, g_j)|.

    The test gradient is split as v = Gᵀ√W y + r into a part in the range of C, whose gap counts, and the rest, whose
    exact score is about 0 and whose sketched score, the leakage, is bounded by Cauchy–Schwarz. It holds for any y.

    Args:
        factor: of `error_factor`.
        train_gaps, test_gaps: of `gaps`.
        rest_norms: ‖Pr_i‖.
        solved_norms: ‖(PCPᵀ+μ)⁻¹Pg_j‖.
        rest_scores: τ_κ(r_i, g_j).
    """
    ranged = factor * test_gaps.clamp(min=0).sqrt()[:, None] * train_gaps.clamp(min=0).sqrt()
    return ranged + rest_norms[:, None] * solved_norms + rest_scores.abs()


def _shifted(matrix: Float64[Tensor, "n n"], shift: float) -> Float64[Tensor, "n n"]:
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return shifted
