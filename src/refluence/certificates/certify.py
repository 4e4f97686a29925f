"""`Influence.certify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from refluence.batches import Data
from refluence.certificates.certificate import Certificate, relative_norms
from refluence.certificates.deterministic import DeterministicBound, deterministic_bound, gram_bytes
from refluence.certificates.sampled import SampledCheck, needed_sample, sampled_check
from refluence.curvature import OuterCurvature
from refluence.errors import DataError
from refluence.scores import Scores
from refluence.solvers import Identity
from refluence.solvers.sketched_state import SketchedState

if TYPE_CHECKING:
    from refluence.influence import Influence

LARGEST_BOUND = 6_000
"""Train examples up to which the certain bound is computed unasked: its factorisations grow with their cube."""
SHARE = 0.95
SHARE_OF_MEMORY = 0.5


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
    fit, settings = influence._fitted(), influence.settings
    if isinstance(fit.plan.chosen.solver, Identity):
        raise DataError("the Identity solver has no inverse whose error could be certified: fit with another solver")
    state, shifts = fit.state, influence.shifts
    tests = influence._test_rows(test)
    size = min(tests.n, needed_sample(SHARE, confidence)) if sample is None else sample
    if not 1 <= size <= tests.n:
        raise DataError(f"sample must be 1 to {tests.n}, the number of tests, not {sample!r}")
    applies, why = _applies(influence)
    if deterministic and why:
        raise DataError(f"there is no certain bound: {why}. Leave deterministic out")
    scores = influence.score(test)
    check, bound, notes = None, None, []
    if not state.exact:
        args = scores.values, scores.error, shifts, size, confidence, seed, settings.execution
        check = sampled_check(state, tests, *args)
    if applies is not None and (deterministic or (deterministic is None and not why and _fits(influence))):
        bound = deterministic_bound(applies, tests, shifts)
    elif why and not state.exact:
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


def _applies(influence: Influence) -> tuple[SketchedState | None, str]:
    """The state that the certain bound is for, or why there is none."""
    fit = influence._fitted()
    if not isinstance(fit.state, SketchedState):
        return None, f"solver {fit.plan.solver} is no sketch"
    if not (isinstance(fit.curvature, OuterCurvature) and fit.curvature.own_rows):
        return None, f'it is for the curvature "fisher", and this is "{influence.curvature}"'
    if any(shift <= 0 for shift in influence.shifts.values()):
        return None, "it is for a damping > 0"
    return fit.state, ""


def _fits(influence: Influence) -> bool:
    """Whether the Gram matrices of the certain bound are small enough to be made unasked."""
    budget = influence.settings.execution.budget(influence._fitted().rows.device)
    size = gram_bytes(influence.n_train, len(influence.groups))
    return influence.n_train <= LARGEST_BOUND and size <= SHARE_OF_MEMORY * budget


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
