"""The bound that holds for every pair, where the exact Gram matrix fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.curvature import OuterCurvature
from refluence.gradients.kernels import cross_grams, gram_matrices
from refluence.gradients.rows import GradientRows
from refluence.solvers.sketched_state import SketchedState
from refluence.solvers.state import Shifts
from refluence.solvers.systems import root_weights, scale_rows, sum_over, weighted_gram
from refluence.theory import numerical_rank
from refluence.theory.certified import error_factor, gaps, score_bounds

RIDGES = (1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""ρ over κ at which a test gradient is split into a part in the span and a rest: the least of their bounds holds."""


@dataclass(frozen=True, eq=False)
class DeterministicBound:
    """|τ̃_ij − τ_ij| ≤ `values`_ij for certain, up to rounding.

    Attributes:
        values: (k, n).
        factors: block → max |1 − (μ/κ)/(1+δ)|, the error relative to √gap·√gap.
        outside: ‖r_i‖/‖v_i‖, the share of each test gradient that lies outside the span of the train gradients.
        leaked: √mean_j (Pr_i)ᵀ(PCPᵀ+μ)⁻¹(Pg_j))², what the sketch made of it, where the exact score is 0.
        leakage_deviation: the same as a Gaussian sketch is expected to make it, ‖r_i‖·√mean_j ‖(PCPᵀ+μ)⁻¹Pg_j‖²/√m.
    """

    values: Float64[Tensor, "k n"]
    factors: dict[str, float]
    outside: Float64[Tensor, " k"]
    leaked: Float64[Tensor, " k"]
    leakage_deviation: Float64[Tensor, " k"]


def gram_bytes(n: int, blocks: int) -> float:
    """Memory of `deterministic_bound`: K, K̃ and their factors."""
    return 8.0 * n * n * (4 + blocks)


def deterministic_bound(state: SketchedState, tests: GradientRows, shifts: Shifts) -> DeterministicBound:
    """`refluence.theory.certified.score_bounds` of every pair, summed over blocks.

    Args:
        state: sketched, of the empirical Fisher, so that the rows of the curvature are the train gradients.
        tests: the test gradients.
        shifts: block → l2 + λ, the damping that the scores estimate (where corrected) or that is on the sketch.
    """
    curvature = state.curvature
    assert isinstance(curvature, OuterCurvature)
    n, roots = curvature.n, root_weights(curvature.weights)
    grams = {b: weighted_gram(gram, n, roots) for b, gram in gram_matrices(curvature.features).items()}
    across = cross_grams(curvature.features, tests)
    projected_tests = state.projected_tests(tests)
    norms = _squared_norms(tests)
    total = torch.zeros(tests.n, n, dtype=torch.float64, device=tests.device)
    outside, leaked, expected = torch.zeros(3, tests.n, dtype=torch.float64, device=tests.device)
    factors, targets = {}, state.targets(shifts)
    for block, gram in grams.items():
        right = scale_rows(across[block], roots)
        damping = state.shift(block, shifts[block])
        target = targets[block]
        rows = scale_rows(state.projected[block].double().clone(), roots)
        sketched = rows @ rows.T / n
        values, vectors = torch.linalg.eigh(gram)
        kept = values > _rank_cut(values)
        values, basis = values[kept], vectors[:, kept]
        along = basis.T @ right
        # (PCPᵀ+μ)⁻¹ P√W g_j by push-through.
        solved = torch.linalg.solve(_shifted(sketched, damping), rows)
        factors[block] = error_factor(gram, sketched, target, damping)
        train_gaps, solved_norms = gaps(gram, None, target), solved.norm(dim=1)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_shifted(gram, target)))
        best: Tensor | None = None
        for ridge in (0.0, *(share * target for share in RIDGES)):
            # v = Gᵀ√W y + r with y = (K+ρ)⁻¹(√W G v)/n; at ρ = 0 r is what lies outside the span.
            coefficients = basis @ (along / (n * (values + ridge))[:, None])
            rest = right - n * (gram @ coefficients)
            rest_rows = projected_tests[block] - coefficients.T @ rows
            rest_norms = rest_rows.norm(dim=1)
            test_gaps = n * target * (coefficients * (inverse @ coefficients)).sum(dim=0)
            rest_scores = (inverse @ rest).T
            bounds = score_bounds(factors[block], train_gaps, test_gaps, rest_norms, solved_norms, rest_scores)
            best = bounds if best is None else torch.minimum(best, bounds)
            if ridge == 0:
                beyond = (norms[block] - (coefficients * (2 * right - n * (gram @ coefficients))).sum(dim=0)).clamp(0)
                outside += beyond
                own = solved if roots is None else solved * roots.to(solved)[:, None]
                leaked += (rest_rows @ own.T).square().mean(dim=1)
                expected += beyond * own.square().sum(dim=1).mean() / state.sketch.m
        assert best is not None
        total += best if roots is None else best * roots.to(best)
    whole = sum_over(iter(norms.values())).clamp(min=torch.finfo(torch.float64).tiny)
    share = (outside / whole).sqrt()
    return DeterministicBound(total, factors, share, leaked.sqrt(), expected.sqrt())


def _rank_cut(values: Float64[Tensor, " n"]) -> float:
    rank = numerical_rank(values.clamp(min=0))
    return float(values[len(values) - rank]) * (1 - 1e-12) if rank else float("inf")


def _squared_norms(rows: GradientRows) -> dict[str, Float64[Tensor, " k"]]:
    parts: dict[str, list[Tensor]] = {}
    for _, blocks in rows:
        for block, gradients in blocks.items():
            parts.setdefault(block, []).append(gradients.squared_norms())
    return {block: torch.cat(found) for block, found in parts.items()}


def _shifted(matrix: Float64[Tensor, "n n"], shift: float) -> Float64[Tensor, "n n"]:
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return shifted
