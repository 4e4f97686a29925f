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
from refluence.solvers import ConjugateGradient, Dense, Gram, Solver
from refluence.solvers.state import Shifts, State

REFERENCE_RTOL = 1e-8
LARGEST_GRAM = 6_000
LARGEST_DENSE = 4_000
TINY = torch.finfo(torch.float64).tiny


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
        enough = np.flatnonzero(stats.binom.sf(np.arange(size), size, share) <= 1 - confidence)
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
    return int(np.ceil(np.log(1 - confidence) / np.log(share)))


def sampled_check(
    state: State,
    tests: GradientRows,
    values: Float64[Tensor, "k n"],
    error: Float64[Tensor, "k n"] | None,
    shifts: Shifts,
    size: int,
    confidence: float,
    seed: int,
    execution: Execution,
) -> SampledCheck:
    """Solve a random sample of tests exactly, from the gradients that the fit kept, and compare.

    Args:
        values, error: of the approximation, all tests.
        shifts: the approximation's own; the exact scores are taken at its targets.
        size: sampled tests, at most k.
    """
    generator = np.random.default_rng(seed)
    rows = torch.from_numpy(np.sort(generator.choice(tests.n, size=min(size, tests.n), replace=False)))
    batches = tests.batches
    chosen = Batches(batches.select(rows.tolist()), batches.batch_size, tests.device, None, "sampled tests")
    sample = GradientRows(tests.capture, chosen, tests.objective, 0, tests.progress)
    solver = reference_solver(state.curvature, execution)
    exact_state = solver.prepare(state.curvature)
    exact = torch.zeros(len(rows), state.n, dtype=torch.float64)
    for _, part in exact_state.scores(sample, state.targets(shifts)):
        exact += part.double().cpu()
    approximate = values[rows].double().cpu()
    difference = (approximate - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=TINY)
    residual = exact_state.diagnostics.get("residual")
    return SampledCheck(
        rows,
        exact,
        difference,
        type(solver).__name__,
        float(np.max(residual)) if residual is not None else None,
        None if error is None else float(_inside(approximate, exact, error[rows].cpu(), confidence).double().mean()),
        confidence,
    )


def reference_solver(curvature: Curvature, execution: Execution) -> Solver:
    """The cheapest solver whose scores are those of the curvature: a factorisation where it is small, else CG."""
    budget = execution.budget(curvature.device)
    d, n = max(curvature.dimensions.values()), curvature.n
    if isinstance(curvature, OuterCurvature) and curvature.own_rows and n <= LARGEST_GRAM and 16.0 * n * n < budget / 4:
        return Gram()
    if d <= LARGEST_DENSE:
        return Dense()
    return ConjugateGradient(rtol=REFERENCE_RTOL)


def _inside(
    values: Float64[Tensor, "s n"], exact: Float64[Tensor, "s n"], error: Float64[Tensor, "s n"], confidence: float
) -> Bool[Tensor, "s n"]:
    return (values - exact).abs() <= float(stats.norm.ppf(0.5 + confidence / 2)) * error
