"""The bound that holds for every pair, where the exact Gram matrix fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from refluence.curvature import OuterCurvature
from refluence.gradients.kernels import cross_grams, gram_matrices
from refluence.gradients.rows import GradientRows
from refluence.solvers.dual import DualState
from refluence.solvers.sketched_state import SketchedState
from refluence.solvers.state import Shifts, State
from refluence.solvers.systems import root_weights, scale_rows, sum_over, weighted_gram
from refluence.theory.certified import certain_bounds


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


def deterministic_bound(
    state: SketchedState, tests: GradientRows, shifts: Shifts, exact: State | None = None
) -> DeterministicBound:
    """`refluence.theory.certified.certain_bounds` of every pair, summed over blocks.

    Args:
        state: sketched, of the empirical Fisher, so that the rows of the curvature are the train gradients.
        tests: the test gradients.
        shifts: block → l2 + λ, the damping that the scores estimate (where corrected) or that is on the sketch.
        exact: a state of the same curvature; the Gram matrices are taken from it where it has them.
    """
    curvature = state.curvature
    assert isinstance(curvature, OuterCurvature)
    n, roots = curvature.n, root_weights(curvature.weights)
    if isinstance(exact, DualState):
        grams = {block: system.matrix for block, system in exact.systems.items()}
    else:
        grams = {b: weighted_gram(gram, n, roots) for b, gram in gram_matrices(curvature.features).items()}
    across = cross_grams(curvature.features, tests)
    projected, projected_tests = state.projected.rows(), state.projected_tests(tests)
    norms = _squared_norms(tests)
    found, factors, targets = [], {}, state.targets(shifts)
    for block, gram in grams.items():
        rows = scale_rows(projected[block].to(device=curvature.device, dtype=torch.float64, copy=True), roots)
        right = scale_rows(across[block], roots)
        dampings = targets[block], state.shift(block, shifts[block])
        bounds = certain_bounds(gram, rows, right, projected_tests[block], norms[block], *dampings, roots)
        factors[block] = bounds.factor
        found.append(bounds)
    whole = sum_over(iter(norms.values())).clamp(min=torch.finfo(torch.float64).tiny)
    return DeterministicBound(
        sum_over(bounds.values for bounds in found),
        factors,
        (sum_over(bounds.outside for bounds in found) / whole).sqrt(),
        sum_over(bounds.leaked for bounds in found).sqrt(),
        sum_over(bounds.expected for bounds in found).sqrt(),
    )


def _squared_norms(rows: GradientRows) -> dict[str, Float64[Tensor, " k"]]:
    parts: dict[str, list[Tensor]] = {}
    for _, blocks in rows:
        for block, gradients in blocks.items():
            parts.setdefault(block, []).append(gradients.squared_norms())
    return {block: torch.cat(found) for block, found in parts.items()}
