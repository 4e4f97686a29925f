"""How large a sketch must be for an accuracy that is asked for.

Axis letters: n train and k test examples, m rows of the sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from scipy import stats
from torch import Tensor

from refluence.batches import Batches
from refluence.damping import DampingChoice, auto_dimension, resolve
from refluence.errors import PlanError, RefluenceError, SketchSizeError
from refluence.execution import format_bytes
from refluence.gradients.rows import GradientRows
from refluence.planning import Plan, estimate, exact_solvers, solver_name
from refluence.sketches import SJLT
from refluence.solvers import Sketched
from refluence.solvers.cost import Workload
from refluence.solvers.sketch_errors import has_error_formula
from refluence.solvers.sketched_state import SketchedState
from refluence.solvers.state import Shifts, State
from refluence.solvers.systems import sum_over

SMALLEST = 256
TINY = torch.finfo(torch.float64).tiny
PROBED = 128
ROOM = 1.15
"""Rows more than the error of the present sketch says are needed, which is itself an estimate."""
TOO_SMALL = 1.5
"""Taken for the error over ε where the sketch cannot have the damping at all: m then grows by TOO_SMALL² at least."""
LARGEST_STEP = 16.0
"""By which a sketch grows at once at most: an error that is larger than the scores is itself a poor estimate."""
ROUNDS = 12


@dataclass(frozen=True)
class Accuracy:
    """How accurate scores are to be: a share `confidence` of the tests, or of the pairs, has an error of at most ε.

    Relative to the "scores", the error of a test is √mean_j se_ij² / √mean_j τ_ij², the root mean square of its scores'
    standard errors over that of its scores. Relative to the "largest", that of a pair is the half-width of its interval
    over √(τ(v,v)·τ(g,g)), the largest that |τ(v,g)| can be: the error of a correlation. Most scores are far below that,
    so it asks for much less.

    Args:
        epsilon: ε, in (0, 1).
        confidence: in (0, 1): the share of tests or pairs, and of the intervals.
        relative_to: "scores" or "largest".

    Raises:
        RefluenceError: a number out of its range, or another word.
    """

    epsilon: float
    confidence: float = 0.95
    relative_to: str = "scores"

    def __post_init__(self) -> None:
        for name in ("epsilon", "confidence"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < 1:
                raise RefluenceError(f"{name} of Accuracy must lie between 0 and 1, not {value!r}")
            object.__setattr__(self, name, float(value))
        if self.relative_to not in ("scores", "largest"):
            raise RefluenceError(f'relative_to of Accuracy must be "scores" or "largest", not {self.relative_to!r}')

    @property
    def z(self) -> float:
        """The normal quantile of the confidence, both sides."""
        return float(stats.norm.ppf(0.5 + self.confidence / 2))

    def first_size(self, workload: Workload) -> int:
        """Rows that a sketch needs at least: (z/ε)² for pairs outside the range of C, twice the dimension inside."""
        dimension = auto_dimension(workload.n, workload.d)
        return _rounded(max(SMALLEST, (self.z / self.epsilon) ** 2, 2 * dimension))


def check_accuracy(accuracy: Any, solver: Any, curvature: str) -> None:
    """Raise unless the solver and the curvature have errors that a sketch's size can lower.

    Raises:
        RefluenceError: another solver than "auto" or a sketch with an error formula; an indefinite curvature.
    """
    if accuracy is None:
        return
    if not isinstance(accuracy, Accuracy):
        raise RefluenceError(f"accuracy must be rf.Accuracy(epsilon, confidence) or None, not {accuracy!r}")
    sized = isinstance(solver, Sketched) and has_error_formula(solver.sketch) and solver.replicates == 1
    if not (sized or solver == "auto"):
        raise RefluenceError(
            f"accuracy chooses the size of a sketch, and solver {solver!r} is none with a standard error: use "
            'solver="auto", or Sketched with a Gaussian, Rademacher or SJLT'
        )
    if curvature == "hessian":
        raise RefluenceError('the "hessian" may be indefinite, and its sketch has no standard error: use "ggn"')


def accurate_plan(plan: Plan, accuracy: Accuracy, curvature: str, seed: int) -> Plan:
    """The plan with the cheapest solver that may give the accuracy: an exact one, or the first sketch."""
    first = estimate(Sketched(SJLT(accuracy.first_size(plan.workload), seed=seed)), plan.workload, plan.budget)
    return _cheapest(plan, first, curvature, _asked(accuracy))


def grown(
    state: State,
    plan: Plan,
    accuracy: Accuracy,
    damping: DampingChoice,
    l2: float,
    curvature: str,
    tests: GradientRows | None = None,
    may_be_exact: bool = True,
) -> tuple[State, Plan]:
    """The state of a sketch that is large enough, or of an exact solver where that takes less work.

    Args:
        state: of the first sketch; one of another solver is given back.
        curvature: its name.
        tests: whose pairs with the train examples are to be accurate; None: pairs of train examples, as many as 128.
        may_be_exact: whether the solver was left to "auto".

    Raises:
        PlanError: a sketch that the accuracy needs does not fit the memory, and no exact solver does.
    """
    for _ in range(ROUNDS):
        if not isinstance(state, SketchedState):
            return state, plan
        try:
            shifts = {block: value + l2 for block, value in resolve(damping, state, l2).items()}
            width = reached(state, tests or _probe(state.curvature.rows), shifts, accuracy)
        except SketchSizeError:
            width = TOO_SMALL * accuracy.epsilon
        if width <= accuracy.epsilon:
            return state, replace(plan, reason=f"{_asked(accuracy)}, of which {width:.2g} is reached")
        solver: Any = plan.chosen.solver
        more = min(ROOM * (width / accuracy.epsilon) ** 2, LARGEST_STEP)
        size = _rounded(state.sketch.m * more, solver.sketch)
        larger = estimate(replace(solver, sketch=replace(solver.sketch, m=size)), plan.workload, plan.budget)
        plan = _cheapest(plan, larger, curvature if may_be_exact else None, _asked(accuracy))
        state = plan.chosen.solver.prepare(state.curvature)
    return state, plan


def reached(state: SketchedState, tests: GradientRows, shifts: Shifts, accuracy: Accuracy) -> float:
    """The ε that a share `confidence` of the tests or pairs has, by the sketch's own standard errors."""
    deviations = state.deviations(tests, shifts)
    assert deviations is not None
    variance = sum_over(part.square() for _, part in deviations)
    if accuracy.relative_to == "scores":
        values = sum_over(part for _, part in state.scores(tests, shifts))
        noise = variance.mean(dim=1)
        # What is seen of the scores has the errors in it.
        size = torch.maximum(values.double().square().mean(dim=1) - noise, noise / LARGEST_STEP)
        ratios = (noise / size.clamp(min=TINY)).sqrt()[noise > 0]
    else:
        scale = largest_scores(state, tests, shifts)
        known = scale > 0
        ratios = accuracy.z * variance[known].sqrt() / scale[known]
    return float(np.quantile(ratios.cpu().numpy(), accuracy.confidence)) if ratios.numel() else 0.0


def largest_scores(state: SketchedState, tests: GradientRows, shifts: Shifts) -> Float64[Tensor, "k n"]:
    """√(τ̃(v_i, v_i)·τ̃(w_j g_j, w_j g_j)), which |τ̃_ij| does not exceed."""
    of_train = state.self_influence(shifts)
    if state.curvature.weights is not None:
        of_train = of_train * state.curvature.weights.to(of_train)
    of_tests = state.test_influence(tests, shifts)
    return (of_tests.clamp(min=0)[:, None] * of_train.clamp(min=0)).sqrt()


def _probe(rows: GradientRows) -> GradientRows:
    """Some train examples, evenly spread, in place of tests that are not known yet."""
    chosen = torch.linspace(0, rows.n - 1, min(PROBED, rows.n)).round().long().unique().tolist()
    batches = rows.batches
    sample = Batches(batches.select(chosen), batches.batch_size, rows.device, None, "probed examples")
    return GradientRows(rows.capture, sample, rows.capture.measurement, 0, progress=False)


def _cheapest(plan: Plan, sketched: Any, curvature: str | None, reason: str) -> Plan:
    """The plan with the sketch, or with an exact solver that fits and takes no more work.

    Raises:
        PlanError: neither fits.
    """
    exact = [] if curvature is None else [estimate(s, plan.workload, plan.budget) for s in exact_solvers(curvature)]
    fitting = [e for e in exact if e.fits(plan.budget)]
    best = min(fitting, key=lambda e: e.work, default=None)
    sized = replace(plan, chosen=sketched, reason=reason)
    if best is not None and (best.work <= sketched.work or not sized.fits):
        why = f"exact, and no dearer than the {solver_name(sketched.solver)} that the accuracy needs"
        return replace(plan, chosen=best, reason=why, alternatives=(sketched, *(e for e in exact if e is not best)))
    if not sized.fits:
        raise PlanError(
            f"the accuracy needs {solver_name(sketched.solver)}, which takes {format_bytes(sketched.memory)} of the "
            f"{format_bytes(plan.budget)} that may be used: ask for a larger epsilon or damping, or raise "
            "rf.Execution(memory=...)"
        )
    return replace(sized, alternatives=tuple(exact))


def _asked(accuracy: Accuracy) -> str:
    units = "the scores" if accuracy.relative_to == "scores" else "the largest scores"
    return f"for an accuracy of {accuracy.epsilon:g} of {units} at {accuracy.confidence:.0%}"


def _rounded(size: float, sketch: Any = None) -> int:
    """Up to the next of 2^k and 3·2^(k−1), a multiple of an SJLT's nonzeros."""
    power = 1 << max(0, math.ceil(size) - 1).bit_length()
    whole = power * 3 // 4 if power * 3 // 4 >= size else power
    nonzeros = getattr(sketch, "nonzeros", 1)
    return -(-whole // nonzeros) * nonzeros
