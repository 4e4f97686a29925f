"""The error on a random sample of tests, measured against the exact inverse, and what that says of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from scipy import stats
from torch import Tensor

from refluence.batches import Batches
from refluence.curvature import Curvature, OuterCurvature
from refluence.errors import DataError
from refluence.execution import Execution
from refluence.gradients.rows import GradientRows
from refluence.scores import Scores
from refluence.solvers import ConjugateGradient, Dense, Gram, Solver
from refluence.solvers.state import Shifts, State
from refluence.solvers.systems import sum_over

REFERENCE_RTOL = 1e-8
LARGEST_GRAM = 6_000
"""Train examples up to which exact scores are by the Gram matrix, whose factorisation grows with their cube."""
SHARE_OF_MEMORY = 0.5
LARGEST_DENSE = 4_000
TINY = torch.finfo(torch.float64).tiny
ROUNDING = 1e-12
"""Of probabilities that are equal but for it."""


@dataclass(frozen=True, eq=False)
class SampledCheck:
    """Exact scores of a random sample of tests beside the approximate ones.

    Attributes:
        rows: which tests, by position.
        exact: (s, n), τ at the damping that the approximation estimates.
        errors: ‖τ̃_i − τ_i‖/‖τ_i‖ of each sampled test.
        reference: the solver that gave the exact scores.
        residual: its largest relative residual, None where it is direct.
        coverage: share of the sampled pairs inside their interval; None where the scores have no standard error.
        confidence: of the intervals.
    """

    rows: Int64[Tensor, " s"]
    exact: Float64[Tensor, "s n"]
    errors: Float64[Tensor, " s"]
    reference: str
    residual: float | None
    coverage: float | None
    confidence: float

    def bound(self, share: float = 0.9, confidence: float | None = None) -> float:
        """An error that, with `confidence`, at most 1 − `share` of tests like these exceed.

        The smallest order statistic e_(r) of the s sampled errors with P[Binomial(s, share) ≥ r] ≤ 1 − confidence: it
        holds whatever the errors' distribution, for tests drawn as the sample was.

        Raises:
            DataError: a sample too small for it, with the size that is needed.
        """
        confidence = self.confidence if confidence is None else confidence
        if not (0 < share < 1 and 0 < confidence < 1):
            raise DataError(f"share and confidence must lie between 0 and 1, not {share!r} and {confidence!r}")
        size = len(self.errors)
        # P[Binomial(s, share) ≥ r] for r = 1 … s falls with r.
        enough = np.flatnonzero(stats.binom.sf(np.arange(size), size, share) <= (1 - confidence) * (1 + ROUNDING))
        if enough.size:
            return float(self.errors.sort().values[enough[0]])
        raise DataError(
            f"{size} sampled tests cannot bound the error of {share:.0%} of tests with confidence {confidence:g}: "
            f"sample {needed_sample(share, confidence)}, or ask for a smaller share"
        )

    @property
    def share(self) -> float:
        """The largest share of tests that the largest sampled error bounds, with the confidence: (1−γ)^{1/s}."""
        return float((1 - self.confidence) ** (1 / len(self.errors)))


def needed_sample(share: float, confidence: float) -> int:
    """Sampled tests whose largest error bounds a share of all with a confidence: log(1−γ)/log(share)."""
    return int(np.ceil(np.log(1 - confidence) / np.log(share) * (1 - ROUNDING)))


@dataclass(frozen=True, eq=False)
class Reference:
    """A solver of the same curvature whose scores are exact."""

    name: str
    state: State

    @classmethod
    def of(cls, curvature: Curvature, execution: Execution) -> Reference:
        """The cheapest: a factorisation where it is small, else conjugate gradients to 1e-8."""
        solver = _reference_solver(curvature, execution)
        return cls(type(solver).__name__, solver.prepare(curvature))


def sampled_check(
    reference: Reference,
    tests: GradientRows,
    scores: Scores,
    targets: Shifts,
    size: int,
    confidence: float,
    seed: int,
) -> SampledCheck:
    """Solve a random sample of tests exactly and compare.

    Args:
        reference: of the approximation's curvature, so that the gradients are those that the fit kept.
        tests: all tests.
        scores: of the approximation, all tests.
        targets: block → l2 + κ, the damping that the approximation estimates.
        size: sampled tests, at most k.
    """
    generator = np.random.default_rng(seed)
    rows = torch.from_numpy(np.sort(generator.choice(tests.n, size=min(size, tests.n), replace=False)))
    batches = tests.batches
    chosen = Batches(batches.select(rows.tolist()), batches.batch_size, tests.device, None, "sampled tests")
    sample = GradientRows(tests.capture, chosen, tests.objective, 0, tests.progress)
    exact = sum_over(part.double().cpu() for _, part in reference.state.scores(sample, targets))
    approximate, error = scores.values[rows].double(), scores.error
    difference = (approximate - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=TINY)
    residual = reference.state.diagnostics.get("residual")
    return SampledCheck(
        rows,
        exact,
        difference,
        reference.name,
        float(np.max(residual)) if residual is not None else None,
        None if error is None else float(_inside(approximate, exact, error[rows], confidence).double().mean()),
        confidence,
    )


def _reference_solver(curvature: Curvature, execution: Execution) -> Solver:
    budget = execution.budget(curvature.device)
    d, n = max(curvature.dimensions.values()), curvature.n
    if isinstance(curvature, OuterCurvature) and curvature.own_rows:
        # The Gram matrices, a factor of one, and what the certain bound makes of it.
        grams = 8.0 * n * n * (4 + len(curvature.groups))
        if n <= LARGEST_GRAM and grams <= SHARE_OF_MEMORY * budget:
            return Gram()
    if d <= LARGEST_DENSE:
        return Dense()
    return ConjugateGradient(rtol=REFERENCE_RTOL)


def _inside(
    values: Float64[Tensor, "s n"], exact: Float64[Tensor, "s n"], error: Float64[Tensor, "s n"], confidence: float
) -> Bool[Tensor, "s n"]:
    return (values - exact).abs() <= float(stats.norm.ppf(0.5 + confidence / 2)) * error
