"""`Influence.certify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from refluence.batches import Data
from refluence.certificates.certificate import Certificate, relative_norms
from refluence.certificates.deterministic import DeterministicBound, deterministic_bound
from refluence.certificates.sampled import Reference, SampledCheck, needed_sample, sampled_check
from refluence.curvature import OuterCurvature
from refluence.errors import DataError
from refluence.scores import Scores
from refluence.solvers import Identity
from refluence.solvers.dual import DualState
from refluence.solvers.sketched_state import SketchedState

if TYPE_CHECKING:
    from refluence.influence import Influence

SHARE = 0.95
"""Of tests that the default sample bounds."""


def certify(
    influence: Influence,
    test: Data,
    confidence: float = 0.95,
    *,
    sample: int | None = None,
    deterministic: bool | None = None,
    seed: int = 0,
) -> Certificate:
    """How far the scores of these tests are from the exact ones of the same curvature at the same damping.

    (a) The solver's own standard error of every pair, with the share of exact scores that its intervals really cover;
    (b) a bound for every pair that holds for certain, for sketches of the empirical Fisher whose Gram matrix fits;
    (c) exact scores of a random sample of tests, and by order statistics a bound on the error of the rest that holds
    whatever its distribution; (d) for each test how much of its gradient lies outside the span of the train gradients,
    and what the sketch makes of it; (e) the residual of an iterative solver.

    It certifies the approximation of τ, not that removing an example does what τ predicts.

    Args:
        influence: fitted.
        test: the test examples.
        confidence: of the statements that are not certain, and of the intervals.
        sample: tests that are solved exactly; None: as many as bound 95 % of all with the confidence, 59 at 0.95, or
            all where there are fewer.
        deterministic: whether (b) and (d) are computed; None: where they apply and n ≤ 6,000.
        seed: of the sample.

    Raises:
        DataError: a confidence outside (0, 1), no or too many sampled tests, (b) asked for where it does not apply, or
            the Identity solver.
    """
    if not 0 < confidence < 1:
        raise DataError(f"confidence must lie between 0 and 1, not {confidence!r}")
    if isinstance(influence._fitted().plan.chosen.solver, Identity):
        raise DataError("the Identity solver has no inverse whose error could be certified: fit with another solver")
    tests = influence._test_rows(test)
    size = min(tests.n, needed_sample(SHARE, confidence)) if sample is None else sample
    if not 1 <= size <= tests.n:
        raise DataError(f"sample must be 1 to {tests.n}, the number of tests, not {sample!r}")
    why = _why_no_bound(influence)
    if deterministic and why:
        raise DataError(f"there is no certain bound: {why}. Leave deterministic out")
    # With an accuracy asked for, scoring may make the sketch grow: the state is that of after.
    scores = influence.score(test)
    fit, shifts = influence._fitted(), influence.shifts
    state = fit.state
    check, bound, notes = None, None, []
    if not state.exact:
        reference = Reference.of(state.curvature, influence.settings.execution)
        check = sampled_check(reference, tests, scores, state.targets(shifts), size, confidence, seed)
        small = isinstance(reference.state, DualState)
        if isinstance(state, SketchedState) and not why and (small if deterministic is None else deterministic):
            bound = deterministic_bound(state, tests, shifts, reference.state)
        elif why:
            notes.append(f"There is no certain bound: {why}.")
    residual = state.diagnostics.get("residual")
    return Certificate(
        scores,
        confidence,
        fit.plan.solver,
        state.exact,
        _frame(scores, check, bound),
        check,
        bound,
        None if residual is None else float(np.max(residual)),
        tuple(notes),
    )


def _why_no_bound(influence: Influence) -> str:
    """Why the certain bound does not apply; empty where it does."""
    fit = influence._fitted()
    if not isinstance(fit.state, SketchedState):
        return f"it is for single sketches, and the solver is {fit.plan.solver}"
    if not (isinstance(fit.curvature, OuterCurvature) and fit.curvature.own_rows):
        return f'it is for the curvature "fisher", and this is "{influence.curvature}"'
    if any(shift <= 0 for shift in influence.shifts.values()):
        return "it is for a damping > 0"
    return ""


def _frame(scores: Scores, check: SampledCheck | None, bound: DeterministicBound | None) -> pd.DataFrame:
    k, n = scores.shape
    nothing = torch.full((k,), torch.nan, dtype=torch.float64)
    checked, error = torch.zeros(k, dtype=torch.bool), nothing.clone()
    if check is not None:
        checked[check.rows] = True
        error[check.rows] = check.errors
    columns: dict[str, Any] = {
        "standard_error": nothing if scores.error is None else relative_norms(scores.error, scores.values),
        "checked": checked,
        "error": error,
        "bound": nothing if bound is None else relative_norms(bound.values.cpu(), scores.values),
        "outside": nothing if bound is None else bound.outside.cpu(),
        "leaked": nothing if bound is None else _relative(bound.leaked, scores, n),
        "leakage_deviation": nothing if bound is None else _relative(bound.leakage_deviation, scores, n),
    }
    return pd.DataFrame({"test": scores.test_ids, **{name: column.numpy() for name, column in columns.items()}})


def _relative(values: Tensor, scores: Scores, n: int) -> Tensor:
    """To the root mean square score of each test."""
    tiny = torch.finfo(torch.float64).tiny
    return values.cpu() / (scores.values.double().norm(dim=1) / n**0.5).clamp(min=tiny)
